//! Generation: sampling, streaming and the generator.
