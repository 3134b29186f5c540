//! Sends messages between ranks over sockets.

use crate::error::{Error, Result};
use std::io::{self, ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

/// Time between two attempts to connect or accept.
const PAUSE: Duration = Duration::from_millis(10);

/// How long a new connection may take to send its rank.
const HELLO_TIMEOUT: Duration = Duration::from_secs(5);

/// Longest message other than gradients, in bytes.
const MAX_BYTES: usize = 1 << 28;

/// Numbers converted to bytes at a time.
const CHUNK: usize = 1 << 14;

/// The kind of a message: the first byte of its header, before its length.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Purpose {
    Hello = 1,
    Json,
    Numbers,
    Gradient,
    Stop,
    #[cfg_attr(not(feature = "nccl"), allow(dead_code))]
    Communicator,
    Failure,
}

/// A connection to another rank.
#[derive(Debug)]
pub(super) struct Link {
    /// The other rank.
    rank: usize,
    stream: TcpStream,
}

impl Link {
    fn new(rank: usize, stream: TcpStream, timeout: Duration) -> io::Result<Self> {
        stream.set_nonblocking(false)?;
        stream.set_nodelay(true)?;
        let link = Self { rank, stream };
        link.set_timeout(timeout)?;
        Ok(link)
    }

    fn set_timeout(&self, timeout: Duration) -> io::Result<()> {
        self.stream.set_read_timeout(Some(timeout))?;
        self.stream.set_write_timeout(Some(timeout))
    }

    pub(super) fn send(&mut self, purpose: Purpose, message: &[u8]) -> Result<()> {
        let bytes = [&header(purpose, message.len())[..], message].concat();
        self.stream.write_all(&bytes).map_err(|error| self.lost(&error))
    }

    pub(super) fn receive(&mut self, purpose: Purpose) -> Result<Vec<u8>> {
        let length = self.receive_header(purpose)?;
        if length > MAX_BYTES {
            return Err(self.astray());
        }
        self.receive_bytes(length)
    }

    pub(super) fn send_values(&mut self, values: &[f32]) -> Result<()> {
        let mut bytes = header(Purpose::Gradient, 4 * values.len()).to_vec();
        for chunk in values.chunks(CHUNK) {
            bytes.extend(chunk.iter().flat_map(|value| value.to_le_bytes()));
            self.stream.write_all(&bytes).map_err(|error| self.lost(&error))?;
            bytes.clear();
        }
        self.stream.write_all(&bytes).map_err(|error| self.lost(&error))
    }

    pub(super) fn receive_values(&mut self, values: &mut [f32]) -> Result<()> {
        if self.receive_header(Purpose::Gradient)? != 4 * values.len() {
            return Err(self.astray());
        }
        let mut bytes = vec![0; 4 * CHUNK.min(values.len())];
        for chunk in values.chunks_mut(CHUNK) {
            let bytes = &mut bytes[..4 * chunk.len()];
            self.stream.read_exact(bytes).map_err(|error| self.lost(&error))?;
            for (value, &bytes) in chunk.iter_mut().zip(bytes.as_chunks().0) {
                *value = f32::from_le_bytes(bytes);
            }
        }
        Ok(())
    }

    /// Sends the error of `rank`.
    pub(super) fn send_failure(&mut self, rank: usize, message: &str) -> io::Result<()> {
        let message = [&(rank as u64).to_le_bytes()[..], message.as_bytes()].concat();
        // do not wait for a rank that does not read
        self.stream.set_write_timeout(Some(HELLO_TIMEOUT))?;
        self.stream.write_all(&header(Purpose::Failure, message.len()))?;
        self.stream.write_all(&message)
    }

    /// The length of the message that follows.
    fn receive_header(&mut self, purpose: Purpose) -> Result<usize> {
        let mut header = [0; 9];
        self.stream.read_exact(&mut header).map_err(|error| self.gone(&error))?;
        let [found, length @ ..] = header;
        let length = u64::from_le_bytes(length) as usize;
        if found == Purpose::Failure as u8 && (8..MAX_BYTES).contains(&length) {
            let message = self.receive_bytes(length)?;
            let (rank, text) = message
                .split_first_chunk()
                .map_or((0, &[][..]), |(rank, text)| (u64::from_le_bytes(*rank) as usize, text));
            return Err(Error::Peer { rank, message: String::from_utf8_lossy(text).into_owned() });
        }
        if found == purpose as u8 { Ok(length) } else { Err(self.astray()) }
    }

    fn receive_bytes(&mut self, length: usize) -> Result<Vec<u8>> {
        let mut bytes = vec![0; length];
        self.stream.read_exact(&mut bytes).map_err(|error| self.gone(&error))?;
        Ok(bytes)
    }

    /// The error for a failed write: the last error the other rank sent, if it sent one.
    fn lost(&mut self, error: &io::Error) -> Error {
        let _ = self.stream.set_read_timeout(Some(HELLO_TIMEOUT));
        match self.receive_header(Purpose::Failure) {
            Err(sent @ Error::Peer { .. }) => sent,
            _ => self.gone(error),
        }
    }

    fn gone(&self, error: &io::Error) -> Error {
        let message = match error.kind() {
            ErrorKind::WouldBlock | ErrorKind::TimedOut => "does not answer".to_owned(),
            ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset | ErrorKind::BrokenPipe => {
                "its process has ended".to_owned()
            }
            _ => error.to_string(),
        };
        Error::Peer { rank: self.rank, message }
    }

    fn astray(&self) -> Error {
        Error::Peer { rank: self.rank, message: "is out of sync: it sent an unexpected message. Check that every rank was started with the same data and settings".into() }
    }
}

fn header(purpose: Purpose, length: usize) -> [u8; 9] {
    let mut header = [purpose as u8; 9];
    header[1..].copy_from_slice(&(length as u64).to_le_bytes());
    header
}

/// The first message of a rank.
fn hello(rank: usize, num_ranks: usize, token: &str) -> Vec<u8> {
    let numbers = [rank, num_ranks].map(|number| (number as u64).to_le_bytes());
    [numbers.as_flattened(), token.as_bytes()].concat()
}

/// Waits for all other ranks and returns rank 0's connections to them.
pub(super) fn accept_all(
    num_ranks: usize,
    address: &str,
    token: &str,
    timeout: Duration,
    answer_timeout: Duration,
) -> Result<Vec<Link>> {
    let deadline = Instant::now() + timeout;
    let failed = |error: io::Error| Error::argument("address", format!("cannot listen at `{address}`: {error}"));
    let listener = TcpListener::bind(address).map_err(failed)?;
    listener.set_nonblocking(true).map_err(failed)?;
    let mut links: Vec<Option<Link>> = (1..num_ranks).map(|_| None).collect();
    while links.iter().any(Option::is_none) {
        match listener.accept() {
            Ok((stream, _)) => {
                // connections that are not ranks of this group are closed
                let Ok(mut link) = Link::new(num_ranks, stream, HELLO_TIMEOUT) else { continue };
                let Ok(said) = link.receive(Purpose::Hello) else { continue };
                let Some(rank) = (1..num_ranks).find(|&rank| said == hello(rank, num_ranks, token)) else { continue };
                link.rank = rank;
                link.set_timeout(answer_timeout).map_err(failed)?;
                links[rank - 1].get_or_insert(link);
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock && Instant::now() < deadline => {
                std::thread::sleep(PAUSE);
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                let rank = links.iter().position(Option::is_none).map_or(0, |index| index + 1);
                return Err(Error::Peer { rank, message: format!("did not connect to `{address}`") });
            }
            Err(error) => return Err(failed(error)),
        }
    }
    let mut links: Vec<Link> = links.into_iter().flatten().collect();
    links.iter_mut().try_for_each(|link| link.send(Purpose::Hello, &[]))?;
    Ok(links)
}

/// Connects to rank 0 and waits until all ranks are connected.
pub(super) fn join(
    rank: usize,
    num_ranks: usize,
    address: &str,
    token: &str,
    timeout: Duration,
    answer_timeout: Duration,
) -> Result<Link> {
    let deadline = Instant::now() + timeout;
    let failed =
        |error: io::Error| Error::Peer { rank: 0, message: format!("cannot be reached at `{address}`: {error}") };
    let stream = loop {
        match TcpStream::connect(address) {
            // connecting to a loopback port without a listener can connect the socket to itself
            Ok(stream) if stream.local_addr().ok() == stream.peer_addr().ok() => drop(stream),
            Ok(stream) => break stream,
            Err(error) if error.kind() == ErrorKind::ConnectionRefused && Instant::now() < deadline => {}
            Err(error) => return Err(failed(error)),
        }
        std::thread::sleep(PAUSE);
    };
    let mut link = Link::new(0, stream, timeout).map_err(failed)?;
    link.send(Purpose::Hello, &hello(rank, num_ranks, token))?;
    link.receive(Purpose::Hello)?;
    link.set_timeout(answer_timeout).map_err(failed)?;
    Ok(link)
}
