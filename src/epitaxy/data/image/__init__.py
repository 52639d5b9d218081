"""From pictures to tensors: resizing, cropping, flipping and normalisation, with PIL and numpy alone."""
