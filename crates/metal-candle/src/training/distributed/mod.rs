//! Data-parallel training: one process per device, each with the whole model and a shard of every step's samples.
//!
//! The processes are the ranks of a [`Group`], numbered from 0. All ranks plan the same steps from the same seed. The
//! samples of a step are divided so that each rank has about the same number of tokens. The flat gradients are summed over
//! all ranks once per step, and then every rank makes the same update, so parameters stay identical bit for bit (digests
//! are compared at each evaluation and at the end). Losses and gradients differ from those of one device by rounding only,
//! except that dropout masks and `NEFTune` noise depend on the number of ranks. Only rank 0 writes files; all ranks read
//! checkpoints.
//!
//! Ranks communicate through loopback sockets, in a star around rank 0. Rank 0 sums the gradients in rank order. On CUDA
//! with the feature `nccl`, NCCL sums them on the device's compute stream instead.
//!
//! A rank that fails sends the reason to the others, and the sockets of a rank that dies are closed, so all ranks return
//! [`Error::Peer`]. Ranks do not read their sockets while NCCL sums: if a process dies then, its launcher must end the
//! other processes.

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

/// How long a rank waits for the others to connect.
const CONNECT_TIMEOUT: Duration = Duration::from_mins(2);

/// How long a rank waits for a message of a connected rank; rank 0 may be writing files.
const ANSWER_TIMEOUT: Duration = Duration::from_mins(30);

/// A handle of one rank to the processes that train together. Clones share the connections.
#[derive(Clone)]
pub struct Group(Arc<Member>);

struct Member {
    rank: usize,
    num_ranks: usize,
    /// Rank 0 has a link to each other rank, in order; the others have one link, to rank 0.
    links: Mutex<Vec<Link>>,
    #[cfg(feature = "nccl")]
    communicator: Mutex<Option<metal_candle_kernels::Communicator>>,
}

impl Group {
    /// The environment variable with the number of ranks; without it a process trains alone.
    pub const NUM_RANKS: &str = "METAL_CANDLE_NUM_RANKS";
    /// The environment variable with the rank of this process.
    pub const RANK: &str = "METAL_CANDLE_RANK";
    /// The environment variable with the address at which rank 0 listens, such as `127.0.0.1:29500`.
    pub const ADDRESS: &str = "METAL_CANDLE_ADDRESS";
    /// The environment variable with the secret of the group; optional.
    pub const TOKEN: &str = "METAL_CANDLE_TOKEN";

    /// Joins the group that the environment variables describe and waits for all ranks; `None` if they are not set.
    ///
    /// # Errors
    /// A variable is missing or invalid, or the ranks do not connect within two minutes.
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

    /// Joins a group: rank 0 listens at `address`, the others connect to it; all must pass the same `token`. Waits until
    /// all ranks are connected.
    ///
    /// # Errors
    /// `rank` is not below `num_ranks`, or the ranks do not connect within two minutes.
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

    /// The rank of this process, from 0.
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
    /// Another rank failed or ended, or passed a tensor of a different length.
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

    /// Collects one message from each rank, in rank order; every rank gets all of them.
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

    /// Collects `own` numbers from each rank, in rank order.
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

    /// Whether `own` is true on any rank.
    pub(super) fn any(&self, own: bool) -> Result<bool> {
        let all = self.gather(Purpose::Stop, &[u8::from(own)])?;
        Ok(all.iter().any(|one| one.as_slice() == [1]))
    }

    /// Returns an error unless `own` is equal on all ranks.
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

    /// Sets up the sums on `device`.
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

    /// Sums the losses of all ranks. If one of them failed, every rank gets an error of the same kind, so that all ranks
    /// handle it in the same way.
    pub(super) fn sum_of_losses(&self, own: Result<f64>) -> Result<f64> {
        let report = match &own {
            // JSON numbers have no NaN, and text keeps every bit
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
        let lost = |rank| Error::Peer { rank, message: "sent no loss".into() };
        all.iter().enumerate().map(|(rank, report)| loss_of(report).ok_or_else(|| lost(rank))).sum()
    }

    /// Sends the error of this rank to the others, which return it as theirs.
    pub(super) fn fail(&self, error: &Error) {
        let (rank, message) = match error {
            Error::Peer { rank, message } => (*rank, message.clone()),
            error => (self.rank(), error.to_string()),
        };
        for link in lock(&self.0.links).iter_mut() {
            // a rank that has ended needs no message
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

/// Sums tensors on CUDA devices.
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
            candle_core::bail!("expected a tensor on a CUDA device")
        }

        fn cuda_fwd(&self, storage: &mut CudaStorage, layout: &Layout) -> candle_core::Result<()> {
            let values = storage.as_cuda_slice_mut::<f32>()?;
            if layout.contiguous_offsets() != Some((0, values.len())) {
                candle_core::bail!("expected a tensor that fills its storage")
            }
            self.0.all_reduce(values).map_err(|message| candle_core::Error::Msg(format!("NCCL: {message}")))
        }
    }
}
