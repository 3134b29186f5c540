//! [`PieceStream`]: streams pieces asynchronously from a thread, without an async runtime.

use super::generation::{GenerationConfig, Piece, Prompt};
use super::generator::Generator;
use super::request::SequenceId;
use crate::error::{Error, Result};
use futures_core::Stream;
use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::thread::JoinHandle;

/// Maximum number of pieces that the thread may be ahead of the reader.
const MAX_AHEAD: usize = 16;

/// The pieces of a generation that runs on its own thread.
///
/// The thread waits when it is 16 pieces ahead. Dropping the stream cancels the generation and waits for the thread,
/// at most as long as one step of the model takes.
#[derive(Debug)]
pub struct PieceStream {
    channel: Arc<Channel>,
    thread: Option<JoinHandle<Generator>>,
}

#[derive(Debug, Default)]
struct Channel {
    state: Mutex<State>,
    /// Notified when a piece is taken and when the reader is dropped.
    taken: Condvar,
}

#[derive(Debug, Default)]
struct State {
    pieces: VecDeque<Result<Piece>>,
    reader: Option<Waker>,
    /// The thread will add no more pieces.
    is_complete: bool,
    /// The reader will take no more pieces.
    is_cancelled: bool,
}

impl Channel {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until fewer than `MAX_AHEAD` pieces are unread, then adds a piece; returns whether the reader still exists.
    fn send(&self, piece: Result<Piece>) -> bool {
        let full = |state: &mut State| state.pieces.len() >= MAX_AHEAD && !state.is_cancelled;
        let mut state = self.taken.wait_while(self.state(), full).unwrap_or_else(PoisonError::into_inner);
        if state.is_cancelled {
            return false;
        }
        state.pieces.push_back(piece);
        if let Some(reader) = state.reader.take() {
            reader.wake();
        }
        true
    }

    fn is_cancelled(&self) -> bool {
        self.state().is_cancelled
    }

    fn cancel(&self) {
        self.state().is_cancelled = true;
        self.taken.notify_all();
    }
}

/// Completes the stream on drop, also if the thread unwinds.
struct Completion(Arc<Channel>);

impl Drop for Completion {
    fn drop(&mut self) {
        let mut state = self.0.state();
        state.is_complete = true;
        if let Some(reader) = state.reader.take() {
            reader.wake();
        }
    }
}

fn run(mut generator: Generator, sequence: SequenceId, channel: Arc<Channel>) -> Generator {
    let completion = Completion(channel);
    while !completion.0.is_cancelled() {
        let piece = generator.next_piece();
        let is_last = piece.as_ref().map_or(true, |piece| piece.finish.is_some());
        if !completion.0.send(piece) || is_last {
            break;
        }
    }
    generator.cancel(sequence);
    generator
}

impl Generator {
    /// Continues `prompt` on a new thread; [`PieceStream::into_generator`] returns the generator.
    ///
    /// # Errors
    /// As [`Generator::generate`], or the thread cannot be started.
    pub fn into_stream(mut self, prompt: impl Into<Prompt>, config: &GenerationConfig) -> Result<PieceStream> {
        let sequence = self.start(prompt.into(), config)?;
        let channel = Arc::new(Channel::default());
        let of_thread = Arc::clone(&channel);
        let thread = std::thread::Builder::new()
            .name("generation".into())
            .spawn(move || run(self, sequence, of_thread))
            .map_err(|error| Error::Device(format!("cannot start the thread of a generation: {error}")))?;
        Ok(PieceStream { channel, thread: Some(thread) })
    }
}

impl PieceStream {
    /// Cancels the rest of the generation and returns the generator with its cache; `None` if its thread panicked.
    pub fn into_generator(mut self) -> Option<Generator> {
        self.channel.cancel();
        self.thread.take()?.join().ok()
    }
}

impl Stream for PieceStream {
    type Item = Result<Piece>;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let mut state = self.channel.state();
        if let Some(piece) = state.pieces.pop_front() {
            drop(state);
            self.channel.taken.notify_one();
            return Poll::Ready(Some(piece));
        }
        if state.is_complete {
            return Poll::Ready(None);
        }
        match &mut state.reader {
            Some(reader) => reader.clone_from(context.waker()),
            reader => *reader = Some(context.waker().clone()),
        }
        Poll::Pending
    }
}

impl Drop for PieceStream {
    fn drop(&mut self) {
        self.channel.cancel();
        if let Some(thread) = self.thread.take() {
            // the panic hook has reported a panic of the thread
            let _ = thread.join();
        }
    }
}
