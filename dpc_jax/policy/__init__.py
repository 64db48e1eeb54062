"""How many bits a layer gets: numbers in, numbers out."""
