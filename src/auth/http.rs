//! Authorisation of HTTP requests (NIP-98): an event of kind 27235 in the `Authorization` header, made for this request and
//! now, by whoever holds the key.
//!
//! In: the header, what the request is, the time. Out: the key, or why not. As NIP-86 asks, the hash of the body is
//! required where there is one. A token is good once: [`Spent`] knows those that were used and could still be used again.
//!
//! <https://github.com/nostr-protocol/nips/blob/master/98.md>

use std::collections::HashMap;

use data_encoding::BASE64_NOPAD;
use sha2::{Digest, Sha256};

use super::Authority;
use crate::protocol::verify::Invalid;
use crate::protocol::{Event, EventId, Kind, PublicKey, Verified};

/// How far a token's `created_at` may be from now, either way, seconds (NIP-98 suggests 60).
pub const WINDOW_SECS: u64 = 60;

/// Tokens that are remembered; more than these in two minutes are refused.
const SPENT_MAX: usize = 10_000;

/// What a token must be made for.
#[derive(Clone, Copy, Debug)]
pub struct Request<'r> {
    /// `POST`.
    pub method: &'r str,
    /// The names of this relay; see [`Authority`] for what of a URL they are.
    pub own: &'r [&'r Authority],
    /// Paths under which the request may be known: its own, and the one that a proxy has taken off. Without a slash at the end.
    pub paths: &'r [&'r str],
    /// What follows the `?`, if anything.
    pub query: Option<&'r str>,
    /// The body.
    pub body: &'r [u8],
}

/// A token that holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Token {
    /// Who made it.
    pub key: PublicKey,
    /// Its id.
    pub id: EventId,
    /// When it was made, in seconds since 1970.
    pub created_at: u64,
}

/// Why a request is not authorised.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum HttpAuthError {
    /// The header is of another scheme.
    #[error("the Authorization header must be `Nostr` and a Base64 event (NIP-98)")]
    WrongScheme,
    /// What follows is no event in Base64.
    #[error("the Authorization header holds no event in Base64")]
    Unreadable,
    /// Another kind than 27235.
    #[error("the event has kind {0}, not 27235")]
    WrongKind(Kind),
    /// Made too long ago, or ahead of time.
    #[error("created_at is {off_secs} s off, at most {WINDOW_SECS} s are accepted; check your clock")]
    WrongTime {
        /// Seconds between `created_at` and now.
        off_secs: u64,
    },
    /// Made for another URL.
    #[error("the u tag is not the URL of this relay")]
    WrongUrl,
    /// The relay does not know under which name the public reaches it.
    #[error("this relay cannot tell whether the u tag names it, since its service_url is not set")]
    OwnNameUnknown,
    /// Made for another method.
    #[error("the method tag is not the method of this request")]
    WrongMethod,
    /// Made for another body, or for none.
    #[error("the payload tag is not the SHA-256 of this request's body")]
    WrongPayload,
    /// Used before.
    #[error("this event was used before; sign a new one for each request")]
    Replayed,
    /// Made before the relay was started, which does not know what was used then.
    #[error("this event is older than the relay's start; sign a new one")]
    BeforeStart,
    /// Too many tokens are remembered.
    #[error("too many requests; try again in a minute")]
    TooMany,
    /// Id, key or signature do not hold.
    #[error("{}", .0.to_string().trim_start_matches("invalid: "))]
    Invalid(#[from] Invalid),
}

/// Reads the token of an `Authorization` header and checks that it is for this request. `now` is in seconds since 1970.
/// Costs a signature check (25 µs) if all else is right.
///
/// # Errors
/// What does not hold, the cheap checks first. Whether the token was used before is for [`Spent`].
pub fn check(header: &str, request: &Request<'_>, now: u64) -> Result<Token, HttpAuthError> {
    let event = read(header)?;
    if event.kind != Kind::HTTP_AUTH {
        return Err(HttpAuthError::WrongKind(event.kind));
    }
    let off_secs = event.created_at.abs_diff(now);
    if off_secs > WINDOW_SECS {
        return Err(HttpAuthError::WrongTime { off_secs });
    }
    let value = |name| event.tags.find(name).and_then(|tag| tag.value()).unwrap_or_default();
    if !request.is_at(value("u")) {
        return Err(if request.own.is_empty() { HttpAuthError::OwnNameUnknown } else { HttpAuthError::WrongUrl });
    }
    if !value("method").eq_ignore_ascii_case(request.method) {
        return Err(HttpAuthError::WrongMethod);
    }
    let hash = faster_hex::hex_string(Sha256::digest(request.body).as_slice());
    if !request.body.is_empty() && !value("payload").eq_ignore_ascii_case(&hash) {
        return Err(HttpAuthError::WrongPayload);
    }
    let verified = Verified::check(event)?;
    Ok(Token { key: verified.pubkey, id: verified.id, created_at: verified.created_at })
}

/// The event of a header. Clients pad Base64 or not, and some take the alphabet for URLs.
fn read(header: &str) -> Result<Event, HttpAuthError> {
    let (scheme, text) = header.trim().split_once(' ').ok_or(HttpAuthError::WrongScheme)?;
    if !scheme.eq_ignore_ascii_case("nostr") {
        return Err(HttpAuthError::WrongScheme);
    }
    let text = text.trim().trim_end_matches('=').replace('-', "+").replace('_', "/");
    let json = BASE64_NOPAD.decode(text.as_bytes()).map_err(|_| HttpAuthError::Unreadable)?;
    let json = std::str::from_utf8(&json).map_err(|_| HttpAuthError::Unreadable)?;
    Event::from_json(json).map_err(|_| HttpAuthError::Unreadable)
}

impl Request<'_> {
    /// Whether a URL is that of this request. The scheme is left out, since a proxy may take TLS off.
    fn is_at(&self, url: &str) -> bool {
        let is_own = Authority::of_url(url).is_some_and(|meant| self.own.contains(&&meant));
        let rest = url.trim().split_once("://").map_or("", |(_, rest)| rest);
        let rest = rest.split_once('#').map_or(rest, |(rest, _)| rest);
        let (address, query) = rest.split_once('?').map_or((rest, None), |(address, query)| (address, Some(query)));
        let path = address.find('/').map_or("", |slash| &address[slash..]).trim_end_matches('/');
        is_own && self.paths.contains(&path) && query.filter(|query| !query.is_empty()) == self.query
    }
}

/// Tokens that were used and are not stale yet.
#[derive(Debug)]
pub struct Spent {
    ids: HashMap<EventId, u64>,
    since: u64,
}

impl Spent {
    /// Remembers from now on. Tokens that are older may have been used before, and are not accepted.
    pub fn since(now: u64) -> Self {
        Spent { ids: HashMap::new(), since: now }
    }

    /// Marks a token as used.
    ///
    /// # Errors
    /// [`HttpAuthError::Replayed`] when it was before, [`HttpAuthError::BeforeStart`] when it may have been; [`HttpAuthError::TooMany`] rather than forgetting one.
    pub fn spend(&mut self, token: &Token, now: u64) -> Result<(), HttpAuthError> {
        if token.created_at < self.since {
            return Err(HttpAuthError::BeforeStart);
        }
        self.ids.retain(|_, created_at| created_at.abs_diff(now) <= WINDOW_SECS);
        if self.ids.contains_key(&token.id) {
            return Err(HttpAuthError::Replayed);
        }
        if self.ids.len() >= SPENT_MAX {
            return Err(HttpAuthError::TooMany);
        }
        self.ids.insert(token.id, token.created_at);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::protocol::testing::{Author, NOW};

    const BODY: &[u8] = br#"{"method":"supportedmethods","params":[]}"#;

    fn hash(body: &[u8]) -> String {
        faster_hex::hex_string(Sha256::digest(body).as_slice())
    }

    fn header(kind: u16, created_at: u64, tags: &[[&str; 2]]) -> String {
        let tags: Vec<Vec<&str>> = tags.iter().map(|tag| tag.to_vec()).collect();
        let event = Author::new(1).event(kind, created_at, &tags, "");
        format!("Nostr {}", data_encoding::BASE64.encode(&event.canonical().json))
    }

    fn token_for(url: &str, method: &str, body: &[u8], created_at: u64) -> String {
        header(27_235, created_at, &[["u", url], ["method", method], ["payload", &hash(body)]])
    }

    fn check_at(header: &str, paths: &[&str], query: Option<&str>) -> Result<Token, HttpAuthError> {
        let own = Authority::of_url("wss://relay.example.com").unwrap();
        check(header, &Request { method: "POST", own: &[&own], paths, query, body: BODY }, NOW)
    }

    fn checked(header: &str) -> Result<Token, HttpAuthError> {
        check_at(header, &[""], None)
    }

    /// A good token, in each alphabet and with and without padding; a scheme, slash, case or default port make no difference.
    #[test]
    fn t35_a_good_token_names_its_key() {
        for url in [
            "https://relay.example.com",
            "wss://relay.example.com/",
            "http://Relay.Example.com:80",
            "HTTPS://relay.example.com/?",
        ] {
            let header = token_for(url, "POST", BODY, NOW - 60);
            let token = checked(&header).unwrap();
            assert_eq!(token.key, Author::new(1).note(NOW, "").pubkey);
            let bare = header.trim_end_matches('=').replace('+', "-").replace('/', "_").replace("Nostr", "nostr");
            assert_eq!(checked(&bare), Ok(token));
        }
        let below = token_for("https://relay.example.com/nostr?a=b", "POST", BODY, NOW);
        assert!(check_at(&below, &["", "/nostr"], Some("a=b")).is_ok());
        assert_eq!(check_at(&below, &["", "/nostr"], None), Err(HttpAuthError::WrongUrl));
    }

    /// Stale, for another URL, method or body, of another kind, forged, or no token at all: each by its name.
    #[test]
    fn what_does_not_hold_is_named() {
        let good = "https://relay.example.com/";
        for url in [
            "https://evil.net/",
            "https://relay.example.com.evil.net/",
            "https://relay.example.com:7777/",
            "https://relay.example.com/other",
            "https://relay.example.com/?x=y",
            "relay.example.com",
            "",
        ] {
            assert_eq!(checked(&token_for(url, "POST", BODY, NOW)), Err(HttpAuthError::WrongUrl), "{url}");
        }
        for created_at in [NOW - 61, NOW + 61] {
            let stale = checked(&token_for(good, "POST", BODY, created_at));
            assert_eq!(stale, Err(HttpAuthError::WrongTime { off_secs: 61 }));
        }
        assert_eq!(checked(&token_for(good, "GET", BODY, NOW)), Err(HttpAuthError::WrongMethod));
        assert_eq!(checked(&token_for(good, "POST", b"{}", NOW)), Err(HttpAuthError::WrongPayload));
        let without = header(27_235, NOW, &[["u", good], ["method", "POST"]]);
        assert_eq!(checked(&without), Err(HttpAuthError::WrongPayload));
        assert_eq!(checked(&header(22_242, NOW, &[["u", good]])), Err(HttpAuthError::WrongKind(Kind(22_242))));
        for scheme in ["", "Nostr", "Basic eA==", "Bearer x"] {
            assert_eq!(checked(scheme), Err(HttpAuthError::WrongScheme), "{scheme}");
        }
        for text in ["Nostr !", "Nostr eA==", "Nostr //8="] {
            assert_eq!(checked(text), Err(HttpAuthError::Unreadable), "{text}");
        }
        let mut forged = Author::new(1).event(
            27_235,
            NOW,
            &[vec!["u", good], vec!["method", "POST"], vec!["payload", hash(BODY).as_str()]],
            "",
        );
        forged.sig.0[0] ^= 1;
        let forged = format!("Nostr {}", data_encoding::BASE64.encode(&forged.canonical().json));
        assert_eq!(checked(&forged), Err(HttpAuthError::Invalid(Invalid::Signature)));
        let request = Request { method: "POST", own: &[], paths: &[""], query: None, body: BODY };
        assert_eq!(check(&token_for(good, "POST", BODY, NOW), &request, NOW), Err(HttpAuthError::OwnNameUnknown));
    }

    /// A token is good once, as long as it could be used at all; what is remembered is bounded and never forgotten early.
    #[test]
    fn a_token_is_good_once() {
        let token = |number: u16, created_at| Token {
            key: PublicKey([1; 32]),
            id: EventId(std::array::from_fn(|at| number.to_be_bytes()[at % 2])),
            created_at,
        };
        let mut spent = Spent::since(NOW);
        assert_eq!(spent.spend(&token(0, NOW - 1), NOW), Err(HttpAuthError::BeforeStart));
        assert_eq!(spent.spend(&token(0, NOW + 60), NOW), Ok(()));
        assert_eq!(spent.spend(&token(0, NOW + 60), NOW + 120), Err(HttpAuthError::Replayed));
        for number in 1..SPENT_MAX as u16 {
            assert_eq!(spent.spend(&token(number, NOW), NOW), Ok(()));
        }
        assert_eq!(spent.spend(&token(SPENT_MAX as u16, NOW), NOW), Err(HttpAuthError::TooMany));
        assert_eq!(spent.spend(&token(SPENT_MAX as u16, NOW + 61), NOW + 61), Ok(()));
    }
}
