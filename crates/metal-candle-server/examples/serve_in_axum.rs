//! Serves a model inside an axum application, beside routes of its own:
//! `cargo run --release -p metal-candle-server --example serve_in_axum [MODEL [ADDRESS]]`.
//!
//! ```sh
//! curl http://127.0.0.1:3000/hello
//! curl http://127.0.0.1:3000/v1/completions -H 'Content-Type: application/json' \
//!   -d '{"model": "my-model", "prompt": "fn main() {", "max_tokens": 16}'
//! ```

use axum::Router;
use axum::routing::get;
use metal_candle::data::Tokenizer;
use metal_candle::{Device, ModelLoader};
use metal_candle_server::{Server, ServerConfig};
use std::error::Error;
use std::path::PathBuf;
use tokio::net::TcpListener;

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let folder = arguments.next().map_or_else(nano, PathBuf::from);
    let address = arguments.next().unwrap_or_else(|| "127.0.0.1:3000".to_owned());

    let model = ModelLoader::new().with_device(Device::new_with_fallback(0)).load(&folder)?;
    let tokenizer = Tokenizer::from_folder(&folder)?;
    let config = ServerConfig { name: "my-model".into(), slots: 8, context: 1024, ..ServerConfig::default() };
    // starts the thread that owns the model; keep the server as long as its routes are used
    let server = Server::new(&model, tokenizer, config)?;

    let application = Router::new().route("/hello", get(|| async { "hello\n" })).merge(server.router());
    let listener = TcpListener::bind(address).await?;
    println!("listening on http://{}", listener.local_addr()?);
    let stopped = async { tokio::signal::ctrl_c().await.unwrap_or_default() };
    axum::serve(listener, application).with_graceful_shutdown(stopped).await?;
    Ok(())
}

/// The built-in model.
fn nano() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../assets/nano"))
}
