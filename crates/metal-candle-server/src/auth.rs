//! Authenticates requests: API keys, their limits, and checks of `Host` and `Origin`.

use crate::config::ApiKey;
use crate::error::ApiError;
use axum::http::{HeaderMap, Method, header};
use sha2::{Digest, Sha256};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};
use subtle::ConstantTimeEq;

/// The sender of a request.
#[derive(Debug, Clone)]
pub(crate) struct Client {
    /// The index of its key.
    pub(crate) owner: usize,
    pub(crate) name: String,
    pub(crate) is_admin: bool,
    pub(crate) max_running: usize,
}

impl Client {
    /// Returns an error unless the client may change adapters, files and jobs.
    pub(crate) fn check_admin(&self) -> Result<(), ApiError> {
        if self.is_admin { Ok(()) } else { Err(ApiError::forbidden("an admin key is required")) }
    }
}

#[derive(Debug)]
struct Known {
    digest: [u8; 32],
    client: Client,
    tokens_per_minute: u64,
    bucket: Mutex<Bucket>,
}

/// The token budget of a key, which refills over time.
#[derive(Debug)]
struct Bucket {
    tokens: f64,
    refilled: Instant,
}

/// The API keys of a server.
#[derive(Debug)]
pub(crate) struct Keys {
    known: Vec<Known>,
}

impl Keys {
    pub(crate) fn new(keys: &[ApiKey]) -> Self {
        let known = keys.iter().enumerate().map(|(index, key)| Known {
            digest: Sha256::digest(key.secret.as_bytes()).into(),
            client: Client {
                owner: index + 1,
                name: key.name.clone(),
                is_admin: key.is_admin,
                max_running: if key.max_running == 0 { usize::MAX } else { key.max_running },
            },
            tokens_per_minute: key.tokens_per_minute,
            bucket: Mutex::new(Bucket { tokens: key.tokens_per_minute as f64, refilled: Instant::now() }),
        });
        Self { known: known.collect() }
    }

    /// The client of a request.
    ///
    /// # Errors
    /// Keys are required, and the request has no key or an unknown one.
    pub(crate) fn client(&self, headers: &HeaderMap) -> Result<Client, ApiError> {
        if self.known.is_empty() {
            return Ok(Client { owner: 0, name: "local".into(), is_admin: true, max_running: usize::MAX });
        }
        let Some(key) = key_of(headers) else {
            return Err(ApiError::unauthorized("a key is required: send the header `Authorization: Bearer KEY`"));
        };
        let digest: [u8; 32] = Sha256::digest(key.as_bytes()).into();
        // compare all keys, so that the time reveals nothing about them
        let mut found = None;
        for known in &self.known {
            if bool::from(known.digest.ct_eq(&digest)) {
                found = Some(&known.client);
            }
        }
        found.cloned().ok_or_else(|| ApiError::unauthorized("the key is unknown"))
    }

    /// The SHA-256 of a client's key; `None` if the server has no keys.
    pub(crate) fn digest(&self, client: &Client) -> Option<&[u8; 32]> {
        self.known.iter().find(|known| known.client.owner == client.owner).map(|known| &known.digest)
    }

    /// Charges `tokens` to the client's budget per minute.
    ///
    /// # Errors
    /// The client has fewer tokens left.
    pub(crate) fn charge(&self, client: &Client, tokens: usize) -> Result<(), ApiError> {
        let Some(known) = self.limited(client) else { return Ok(()) };
        let limit = known.tokens_per_minute as f64;
        let mut bucket = known.bucket.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        bucket.tokens = (bucket.tokens + limit * (now - bucket.refilled).as_secs_f64() / 60.0).min(limit);
        bucket.refilled = now;
        // a request larger than the budget of a minute needs a full bucket
        let tokens = (tokens as f64).min(limit);
        if tokens > bucket.tokens {
            let message = format!("the limit of this key is {limit} tokens per minute; the request may use {tokens}");
            let wait = ((tokens - bucket.tokens) / limit * 60.0).ceil();
            return Err(ApiError::rate_limit(message, Duration::from_secs_f64(wait.max(1.0))));
        }
        bucket.tokens -= tokens;
        Ok(())
    }

    /// Refunds tokens that were charged and not used.
    pub(crate) fn refund(&self, owner: usize, tokens: usize) {
        if let Some(known) = self.known.iter().find(|known| known.client.owner == owner) {
            let mut bucket = known.bucket.lock().unwrap_or_else(PoisonError::into_inner);
            bucket.tokens = (bucket.tokens + tokens as f64).min(known.tokens_per_minute as f64);
        }
    }

    fn limited(&self, client: &Client) -> Option<&Known> {
        self.known.iter().find(|known| known.client.owner == client.owner && known.tokens_per_minute > 0)
    }
}

/// The key in the headers, as OpenAI's or Anthropic's clients send it.
fn key_of(headers: &HeaderMap) -> Option<&str> {
    let bearer = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
    let bearer = bearer.and_then(|value| {
        let (scheme, key) = value.split_once(' ')?;
        scheme.eq_ignore_ascii_case("bearer").then_some(key.trim())
    });
    bearer.or_else(|| headers.get("x-api-key")?.to_str().ok())
}

/// The host names of a server, and the origins whose pages may use it.
#[derive(Debug)]
pub(crate) struct Origins {
    hosts: Vec<String>,
    allowed: Vec<String>,
}

impl Origins {
    pub(crate) fn new(hosts: &[String], allowed: &[String]) -> Self {
        let lower = |text: &String| text.trim_end_matches('/').to_ascii_lowercase();
        // any port is allowed
        let name = |text: &String| {
            let text = lower(text);
            text.split_once(':')
                .filter(|(_, port)| !port.contains(':'))
                .map_or(text.clone(), |(name, _)| name.to_owned())
        };
        Self { hosts: hosts.iter().map(name).collect(), allowed: allowed.iter().map(lower).collect() }
    }

    /// Checks the `Host` and `Origin` of a request.
    ///
    /// # Errors
    /// 403 for an unknown host name, which protects against DNS rebinding, and for requests of other sites' pages.
    pub(crate) fn check(&self, method: &Method, headers: &HeaderMap) -> Result<(), ApiError> {
        // a value that is not ASCII is no known name
        let text = |name: &str| headers.get(name).map(|value| value.to_str().unwrap_or("unknown"));
        let host = text("host").unwrap_or_default().to_ascii_lowercase();
        if !self.is_own_host(&host) {
            let message = "`Host` is not a name of this server; start it with --allowed-hosts NAME to allow it";
            return Err(ApiError::forbidden(message));
        }
        let is_permitted = match text("origin").map(str::to_ascii_lowercase) {
            Some(origin) => {
                let is_own = origin.split_once("://").is_some_and(|(_, rest)| rest == host);
                is_own || self.is_allowed(&origin) || (method == Method::GET && origin != "null")
            }
            // browsers send it with every request
            None => method == Method::GET || matches!(text("sec-fetch-site"), None | Some("same-origin" | "none")),
        };
        if is_permitted {
            return Ok(());
        }
        Err(ApiError::forbidden("this origin may not use the server; start it with --cors-origin URL to allow it"))
    }

    /// Whether pages of this origin may read responses.
    pub(crate) fn is_allowed(&self, origin: &str) -> bool {
        self.allowed.iter().any(|allowed| allowed.eq_ignore_ascii_case(origin))
    }

    fn is_own_host(&self, host: &str) -> bool {
        // HTTP/1.0 has no `Host`
        if host.is_empty() {
            return true;
        }
        let name = match host.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
            Some((address, _)) => address,
            None => host.rsplit_once(':').map_or(host, |(name, _)| name),
        };
        // DNS rebinding needs a name, so addresses are safe
        let is_address = name.parse::<std::net::IpAddr>().is_ok();
        is_address || name == "localhost" || name.ends_with(".localhost") || self.hosts.iter().any(|own| own == name)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;

    fn headers(list: &[(&str, &str)]) -> HeaderMap {
        let pair = |(name, value): &(&str, &str)| {
            (header::HeaderName::try_from(*name).unwrap(), header::HeaderValue::from_bytes(value.as_bytes()).unwrap())
        };
        list.iter().map(pair).collect()
    }

    #[test]
    fn keys_are_accepted_in_both_headers() {
        let key = |name: &str, is_admin| ApiKey {
            name: name.into(),
            secret: format!("sk-{name}"),
            is_admin,
            max_running: 0,
            tokens_per_minute: 60,
        };
        let keys = Keys::new(&[key("a", false), key("b", true)]);
        let found = keys.client(&headers(&[("authorization", "Bearer sk-b")])).unwrap();
        assert_eq!((found.name.as_str(), found.is_admin), ("b", true));
        let found = keys.client(&headers(&[("x-api-key", "sk-a")])).unwrap();
        assert!(found.check_admin().is_err());
        for wrong in [vec![], vec![("authorization", "Bearer sk-")], vec![("authorization", "sk-b")]] {
            assert_eq!(keys.client(&headers(&wrong)).unwrap_err().status, 401);
        }
        keys.charge(&found, 50).unwrap();
        let error = keys.charge(&found, 50).unwrap_err();
        assert!(error.status == 429 && error.retry_after.unwrap() >= Duration::from_secs(39));
        keys.refund(found.owner, 45);
        keys.charge(&found, 50).unwrap();
    }

    #[test]
    fn other_names_and_other_sites_are_refused() {
        let origins = Origins::new(&["Models.Example:8080".into()], &["https://chat.example/".into()]);
        let check = |host: &str, origin: Option<&str>| {
            let mut list = vec![("host", host)];
            list.extend(origin.map(|origin| ("origin", origin)));
            origins.check(&Method::POST, &headers(&list)).is_ok()
        };
        for host in
            ["127.0.0.1:8080", "localhost:1", "[::1]:8080", "192.168.0.7:80", "models.example", "models.example:443"]
        {
            assert!(check(host, None), "{host}");
        }
        for host in ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example:8080"] {
            assert!(!check(host, None), "{host}");
        }
        assert!(check("localhost:8080", Some("http://localhost:8080")));
        assert!(check("localhost:8080", Some("https://chat.example")));
        assert!(!check("localhost:8080", Some("https://evil.example")));
        assert!(!check("localhost:8080", Some("http://localhost:3000")));
        assert!(!check("localhost:8080", Some("null")));
        assert!(!check("localhost:8080", Some("http://localh\u{f6}st")) && !check("localh\u{f6}st:8080", None));
        let from = |site: &str, method: &Method| {
            origins.check(method, &headers(&[("host", "localhost"), ("sec-fetch-site", site)])).is_ok()
        };
        assert!(from("none", &Method::POST) && from("same-origin", &Method::POST) && from("cross-site", &Method::GET));
        assert!(!from("cross-site", &Method::POST) && !from("same-site", &Method::DELETE));
    }
}
