//! Generates ids of objects that cannot be guessed.

const ALPHABET: &[u8; 62] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789";
const LENGTH: usize = 24;

/// `prefix` and 24 random letters and digits.
pub(crate) fn new_id(prefix: &str) -> String {
    let mut id = String::with_capacity(prefix.len() + LENGTH);
    id.push_str(prefix);
    let mut bytes = [0; 2 * LENGTH];
    while id.len() < prefix.len() + LENGTH {
        fill(&mut bytes);
        // 62 of 64 values are used, with equal probability
        let usable = bytes.iter().filter_map(|byte| ALPHABET.get(usize::from(byte & 63)));
        id.extend(usable.take(prefix.len() + LENGTH - id.len()).map(|&byte| char::from(byte)));
    }
    id
}

fn fill(bytes: &mut [u8]) {
    if let Err(error) = getrandom::fill(bytes) {
        // without randomness ids could repeat and be guessed
        tracing::error!("the operating system has no random numbers: {error}");
        std::process::abort();
    }
}

/// Seconds since 1970.
pub(crate) fn unix_time() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_have_their_form() {
        let (first, second) = (new_id("call_"), new_id("call_"));
        assert_eq!(first.len(), 29);
        assert!(first.starts_with("call_") && first[5..].bytes().all(|byte| byte.is_ascii_alphanumeric()));
        assert_ne!(first, second);
    }
}
