//! Computes optimizer steps on flat buffers, in place.

mod adafactor;
mod adam;
mod eight_bit;
mod momentum;
mod muon;
mod schedule_free;
mod section;

pub use adafactor::{AdafactorStep, adafactor_matrices, adafactor_vectors};
pub use adam::{AdamStep, adam};
pub use eight_bit::{BLOCK, adamw_8bit, dynamic_codes};
pub use momentum::{LionStep, SgdStep, lion, sgd};
pub use muon::{MuonStep, muon};
pub use schedule_free::{ScheduleFreeStep, schedule_free_adamw};
pub use section::{MatrixSection, Section, sum_of_squares};
