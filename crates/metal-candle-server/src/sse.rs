//! Streams server-sent events: one task writes them, and the response body forwards them.

use crate::error::ApiError;
use axum::body::{Body, Bytes};
use axum::http::{HeaderName, HeaderValue, header};
use axum::response::Response;
use futures_core::Stream;
use serde_json::{Value, json};
use std::pin::Pin;
use std::task::{Context, Poll};
use tokio::sync::mpsc;

/// The client has closed the connection.
#[derive(Debug)]
pub(crate) struct Closed;

/// Writes the events of a stream.
#[derive(Debug)]
pub(crate) struct Events {
    sender: mpsc::Sender<Bytes>,
}

impl Events {
    /// Sends an event without a name. Waits while the client is slow.
    pub(crate) async fn data(&self, data: &Value) -> Result<(), Closed> {
        self.send(format!("data: {}\n\n", one_line(data))).await
    }

    /// Sends an event with a name.
    pub(crate) async fn named(&self, name: &str, data: &Value) -> Result<(), Closed> {
        self.send(format!("event: {name}\ndata: {}\n\n", one_line(data))).await
    }

    /// Sends the end of an OpenAI stream.
    pub(crate) async fn done(&self) -> Result<(), Closed> {
        self.send("data: [DONE]\n\n".into()).await
    }

    /// Sends an error as the last event.
    pub(crate) async fn error(&self, error: &ApiError) -> Result<(), Closed> {
        self.data(&json!({"error": error.object()})).await
    }

    async fn send(&self, text: String) -> Result<(), Closed> {
        self.sender.send(text.into()).await.map_err(|_| Closed)
    }
}

/// JSON on one line, also for readers that split lines at Unicode line breaks.
fn one_line(data: &Value) -> String {
    let text = data.to_string();
    if !text.contains(['\u{85}', '\u{2028}', '\u{2029}']) {
        return text;
    }
    // these characters can only occur in strings
    text.replace('\u{85}', "\\u0085").replace('\u{2028}', "\\u2028").replace('\u{2029}', "\\u2029")
}

struct EventBody(mpsc::Receiver<Bytes>);

impl Stream for EventBody {
    type Item = Result<Bytes, std::convert::Infallible>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.0.poll_recv(context).map(|event| event.map(Ok))
    }
}

/// A response with the events that `write` sends. If the client closes the connection, `write` is dropped.
pub(crate) fn respond<F, W>(write: W) -> Response
where
    W: FnOnce(Events) -> F,
    F: Future<Output = Result<(), Closed>> + Send + 'static,
{
    let (sender, receiver) = mpsc::channel(1);
    let closed = sender.clone();
    let writing = write(Events { sender });
    tokio::spawn(async move {
        tokio::select! {
            _ = writing => {}
            () = closed.closed() => {}
        }
    });
    let mut response = Response::new(Body::from_stream(EventBody(receiver)));
    let headers = response.headers_mut();
    let lines = [
        (header::CONTENT_TYPE, "text/event-stream; charset=utf-8"),
        (header::CACHE_CONTROL, "no-cache, no-transform"),
        (HeaderName::from_static("x-accel-buffering"), "no"),
    ];
    for (name, value) in lines {
        headers.insert(name, HeaderValue::from_static(value));
    }
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unicode_line_breaks_are_escaped() {
        let text = one_line(&json!({"a": "x\u{2028}y\u{85}\n"}));
        assert_eq!(text, "{\"a\":\"x\\u2028y\\u0085\\n\"}");
        assert_eq!(serde_json::from_str::<Value>(&text).ok(), Some(json!({"a": "x\u{2028}y\u{85}\n"})));
    }
}
