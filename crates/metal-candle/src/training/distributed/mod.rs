//! Training on several devices at once: one process a device, each with the whole model and a share of every step's samples.
//!
//! The processes are the ranks of a [`Group`], numbered from 0. All plan the same steps from the same seed. The samples of a
//! step are divided so that each rank has about as many tokens; the flat gradients are summed over all ranks once a step,
//! and then every rank makes the same update, so that parameters stay the same bit for bit (digests are compared at each
//! evaluation and at the end). Losses and gradients are those of one device but for rounding, as long as nothing is random:
//! masks of dropout and noise of `NEFTune` depend on the number of ranks. Rank 0 alone writes files; all read checkpoints.
//!
//! Ranks talk through loopback sockets, in a star around rank 0. Gradients go the same way, added up in the order of the ranks,
//! unless the device is CUDA and the feature `nccl` is on: then NCCL sums them on the stream that the device computes on.
//!
//! A rank that fails tells the others why, and one that dies closes its sockets, so that all of them end with
//! [`Error::Peer`]. Only while NCCL sums is nobody listening: whoever started the processes must end the rest if one dies.

mod share;
mod wire;

pub(super) use share::divide;

use crate::device::Device;
use crate::error::{Error, Result};
use candle_core::Tensor;
use serde_json::{Value, json};
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use wire::{Link, Purpose};

/// How long a rank waits for the others to come.
const CONNECT_TIMEOUT: Duration = Duration::from_mins(2);

/// How long a rank waits for another one that is alive; rank 0 may write files meanwhile.
const ANSWER_TIMEOUT: Duration = Duration::from_mins(30);

/// The processes that train together, as one of them sees it. Clones are the same member.
#[derive(Clone)]
pub struct Group(Arc<Member>);

struct Member {
    rank: usize,
    num_ranks: usize,
    /// To all others for rank 0, in order; to rank 0 for the others.
    links: Mutex<Vec<Link>>,
    #[cfg(feature = "nccl")]
    communicator: Mutex<Option<metal_candle_kernels::Communicator>>,
}

impl Group {
    /// The environment variable of the number of ranks; without it a process trains alone.
    pub const NUM_RANKS: &str = "METAL_CANDLE_NUM_RANKS";
    /// That of the rank of this process.
    pub const RANK: &str = "METAL_CANDLE_RANK";
    /// That of the address where rank 0 listens, as in `127.0.0.1:29500`.
    pub const ADDRESS: &str = "METAL_CANDLE_ADDRESS";
    /// That of a word that only the processes of the group know; it may be missing.
    pub const TOKEN: &str = "METAL_CANDLE_TOKEN";

    /// Joins the group that the environment tells of, and waits until all ranks are there; none if it tells of none.
    ///
    /// # Errors
    /// A variable is missing or wrong, or the ranks do not find each other within two minutes.
    pub fn from_environment() -> Result<Option<Self>> {
        let Ok(num_ranks) = std::env::var(Self::NUM_RANKS) else { return Ok(None) };
        let number = |name: &str, text: &str| {
            let wrong = || Error::argument(name, format!("expected a whole number, found `{text}`"));
            text.parse::<usize>().map_err(|_| wrong())
        };
        let variable = |name: &str| std::env::var(name).map_err(|_| Error::argument(name, "is not set"));
        let rank = number(Self::RANK, &variable(Self::RANK)?)?;
        let num_ranks = number(Self::NUM_RANKS, &num_ranks)?;
        let token = std::env::var(Self::TOKEN).unwrap_or_default();
        Self::connect(rank, num_ranks, &variable(Self::ADDRESS)?, &token).map(Some)
    }

    /// Joins a group: rank 0 listens at `address`, the others connect to it; all must give the same `token`. Waits until
    /// all ranks are there.
    ///
    /// # Errors
    /// There is no such rank, or the ranks do not find each other within two minutes.
    pub fn connect(rank: usize, num_ranks: usize, address: &str, token: &str) -> Result<Self> {
        if rank >= num_ranks {
            return Err(Error::argument("rank", format!("expected a number below {num_ranks}, found `{rank}`")));
        }
        let links = if num_ranks == 1 {
            Vec::new()
        } else if rank == 0 {
            wire::accept_all(num_ranks, address, token, CONNECT_TIMEOUT, ANSWER_TIMEOUT)?
        } else {
            vec![wire::join(rank, num_ranks, address, token, CONNECT_TIMEOUT, ANSWER_TIMEOUT)?]
        };
        Ok(Self(Arc::new(Member {
            rank,
            num_ranks,
            links: Mutex::new(links),
            #[cfg(feature = "nccl")]
            communicator: Mutex::new(None),
        })))
    }

    /// The number of this process, from 0.
    pub fn rank(&self) -> usize {
        self.0.rank
    }

    /// The number of processes.
    pub fn num_ranks(&self) -> usize {
        self.0.num_ranks
    }

    /// Sums an f32 tensor (`[n]`, contiguous) over all ranks in place; all get the same bits.
    ///
    /// # Errors
    /// Another rank failed or ended, or gave a tensor of another length.
    pub fn all_reduce(&self, tensor: &Tensor) -> Result<()> {
        if self.num_ranks() == 1 {
            return Ok(());
        }
        #[cfg(feature = "nccl")]
        if let Some(communicator) = lock(&self.0.communicator).as_ref() {
            return Ok(tensor.inplace_op1(&nccl::Sum(communicator))?);
        }
        let mut values = tensor.to_vec1::<f32>()?;
        self.sum(&mut values)?;
        Ok(tensor.slice_set(&Tensor::from_vec(values, tensor.dims1()?, tensor.device())?, 0, 0)?)
    }

    fn sum(&self, values: &mut [f32]) -> Result<()> {
        let mut links = lock(&self.0.links);
        if self.rank() == 0 {
            let mut others = vec![0.0; values.len()];
            for link in links.iter_mut() {
                link.receive_values(&mut others)?;
                for (sum, value) in values.iter_mut().zip(&others) {
                    *sum += value;
                }
            }
            links.iter_mut().try_for_each(|link| link.send_values(values))
        } else {
            links.iter_mut().try_for_each(|link| link.send_values(values).and_then(|()| link.receive_values(values)))
        }
    }

    /// What each rank has to say, in the order of the ranks; every rank gets the same.
    fn gather(&self, purpose: Purpose, own: &[u8]) -> Result<Vec<Vec<u8>>> {
        let mut links = lock(&self.0.links);
        if self.rank() == 0 {
            let mut all = vec![own.to_vec()];
            for link in links.iter_mut() {
                all.push(link.receive(purpose)?);
            }
            for link in links.iter_mut() {
                all.iter().try_for_each(|one| link.send(purpose, one))?;
            }
            return Ok(all);
        }
        let mut all = Vec::with_capacity(self.num_ranks());
        for link in links.iter_mut() {
            link.send(purpose, own)?;
            for _ in 0..self.num_ranks() {
                all.push(link.receive(purpose)?);
            }
        }
        Ok(all)
    }

    /// The numbers of each rank.
    pub(super) fn gather_numbers(&self, own: &[f64]) -> Result<Vec<Vec<f64>>> {
        let bytes: Vec<u8> = own.iter().flat_map(|number| number.to_le_bytes()).collect();
        let numbers = |bytes: Vec<u8>| bytes.as_chunks().0.iter().map(|&bytes| f64::from_le_bytes(bytes)).collect();
        Ok(self.gather(Purpose::Numbers, &bytes)?.into_iter().map(numbers).collect())
    }

    fn gather_json(&self, own: &Value) -> Result<Vec<Value>> {
        let all = self.gather(Purpose::Json, own.to_string().as_bytes())?;
        let read = |(rank, bytes): (usize, Vec<u8>)| {
            serde_json::from_slice(&bytes).map_err(|error| Error::Peer { rank, message: error.to_string() })
        };
        all.into_iter().enumerate().map(read).collect()
    }

    /// Whether any rank says so.
    pub(super) fn any(&self, own: bool) -> Result<bool> {
        let all = self.gather(Purpose::Stop, &[u8::from(own)])?;
        Ok(all.iter().any(|one| one.as_slice() == [1]))
    }

    /// Refuses to go on unless `own` is the same on all ranks.
    pub(super) fn check_same(&self, what: &str, own: &str) -> Result<()> {
        let all = self.gather_json(&json!([what, own]))?;
        let differs = |(rank, other): (usize, &Value)| (*other != all[0]).then_some(rank);
        match all.iter().enumerate().find_map(differs) {
            None => Ok(()),
            Some(rank) => {
                let message = format!("{what}: rank 0 has {}, this one {}", all[0][1], all[rank][1]);
                Err(Error::Peer { rank, message })
            }
        }
    }

    /// Makes what is needed to sum on `device`.
    pub(super) fn prepare(&self, device: Device) -> Result<()> {
        if self.num_ranks() > 1 && device.is_metal() {
            return Err(Error::Unsupported("training on more than one Metal device".into()));
        }
        #[cfg(feature = "nccl")]
        if self.num_ranks() > 1
            && lock(&self.0.communicator).is_none()
            && let candle_core::Device::Cuda(device) = device.candle()
        {
            use metal_candle_kernels::{Communicator, communicator_id};
            let failed = |message| Error::Device(format!("NCCL: {message}"));
            let own = if self.rank() == 0 { communicator_id().map_err(failed)? } else { Vec::new() };
            let ids = self.gather(Purpose::Communicator, &own)?;
            let made = Communicator::new(device.cuda_stream(), self.rank(), self.num_ranks(), &ids[0]);
            let communicator = made.map_err(failed)?;
            *lock(&self.0.communicator) = Some(communicator);
        }
        Ok(())
    }

    /// The loss of a step from the sums of all ranks, or what went wrong on any of them: then every rank gets an error of
    /// the same kind, so that all go on in the same way.
    pub(super) fn sum_of_losses(&self, own: Result<f64>) -> Result<f64> {
        let report = match &own {
            // as text floats come back exactly, and NaN is one
            Ok(loss) => json!({"loss": loss.to_string()}),
            Err(Error::NonFiniteLoss { step, loss, rows }) => {
                json!({"failed": "loss", "step": step, "loss": loss.to_string(), "rows": rows})
            }
            Err(error) if error.is_out_of_memory() => json!({"failed": "memory", "message": error.to_string()}),
            Err(error) => json!({"failed": "otherwise", "message": error.to_string()}),
        };
        let all = self.gather_json(&report)?;
        let loss_of = |report: &Value| report["loss"].as_str().and_then(|text| text.parse::<f64>().ok());
        let failed =
            |kind: &str| all.iter().enumerate().filter(|(_, report)| report["failed"] == kind).collect::<Vec<_>>();
        let [otherwise, diverged, memory] = ["otherwise", "loss", "memory"].map(failed);
        let message = |report: &Value| report["message"].as_str().unwrap_or_default().to_owned();
        if let Some((rank, report)) = otherwise.first() {
            return match own {
                Err(error) if !error.is_out_of_memory() => Err(error),
                _ => Err(Error::Peer { rank: *rank, message: message(report) }),
            };
        }
        if let Some((_, first)) = diverged.first() {
            let rows = diverged.iter().flat_map(|(_, report)| report["rows"].as_array().into_iter().flatten());
            return Err(Error::NonFiniteLoss {
                step: first["step"].as_u64().unwrap_or(0) as usize,
                loss: loss_of(first).unwrap_or(f64::NAN),
                rows: rows.filter_map(|row| row.as_str().map(str::to_owned)).collect(),
            });
        }
        if let Some((rank, report)) = memory.first() {
            return Err(Error::OutOfMemory(format!("rank {rank}: {}", message(report))));
        }
        let lost = |rank| Error::Peer { rank, message: "has no loss to tell".into() };
        all.iter().enumerate().map(|(rank, report)| loss_of(report).ok_or_else(|| lost(rank))).sum()
    }

    /// Tells the others that this rank cannot go on, and why; they end with the same error.
    pub(super) fn fail(&self, error: &Error) {
        let (rank, message) = match error {
            Error::Peer { rank, message } => (*rank, message.clone()),
            error => (self.rank(), error.to_string()),
        };
        for link in lock(&self.0.links).iter_mut() {
            // whoever is gone need not be told
            let _ = link.send_failure(rank, &message);
        }
    }
}

impl fmt::Debug for Group {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Group({} of {})", self.rank(), self.num_ranks())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Sums on CUDA devices.
#[cfg(feature = "nccl")]
mod nccl {
    use candle_core::{CpuStorage, CudaStorage, InplaceOp1, Layout};
    use metal_candle_kernels::Communicator;

    /// The sum of a tensor over all ranks.
    pub(super) struct Sum<'a>(pub(super) &'a Communicator);

    impl InplaceOp1 for Sum<'_> {
        fn name(&self) -> &'static str {
            "sum over ranks"
        }

        fn cpu_fwd(&self, _: &mut CpuStorage, _: &Layout) -> candle_core::Result<()> {
            candle_core::bail!("a tensor of a CUDA device is wanted")
        }

        fn cuda_fwd(&self, storage: &mut CudaStorage, layout: &Layout) -> candle_core::Result<()> {
            let values = storage.as_cuda_slice_mut::<f32>()?;
            if layout.contiguous_offsets() != Some((0, values.len())) {
                candle_core::bail!("a tensor that fills its storage is wanted")
            }
            self.0.all_reduce(values).map_err(|message| candle_core::Error::Msg(format!("NCCL: {message}")))
        }
    }
}
