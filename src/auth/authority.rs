//! Host and port of a relay: the part of its URL by which an `AUTH` event is known to be meant for it (NIP-42).
//!
//! NIP-42 finds it enough that the domain is right. The scheme is left out because a proxy may take TLS off, the path
//! because clients disagree about trailing slashes and one host has one operator; the port stays in, since on a shared
//! host another port may be another person's relay.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Names that no stranger can own: they are not in the public DNS (RFC 6761, 6762, 8375, and what routers hand out).
const LOCAL_SUFFIXES: [&str; 7] = [".localhost", ".local", ".lan", ".home", ".home.arpa", ".internal", ".localdomain"];

/// Host and port, in the form that comparisons use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Authority {
    /// Lower case, without a trailing dot; IPv6 without brackets.
    host: Box<str>,
    /// `None`: 80 or 443, which one a proxy may change.
    port: Option<u16>,
}

impl Authority {
    /// The host and port of a relay's URL. What has no scheme of the web, names a user, or is no host is nobody's.
    pub fn of_url(url: &str) -> Option<Self> {
        let (scheme, rest) = url.trim().split_once("://")?;
        if !["wss", "ws", "https", "http"].iter().any(|known| scheme.eq_ignore_ascii_case(known)) {
            return None;
        }
        let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
        Authority::parse(&rest[..end])
    }

    /// Reads `host`, `host:port` or `[IPv6]:port`, as a `Host` header has it.
    pub fn parse(text: &str) -> Option<Self> {
        let (host, port) = match text.strip_prefix('[') {
            Some(rest) => {
                let (host, port) = rest.split_once(']')?;
                (host.parse::<Ipv6Addr>().ok()?.to_canonical().to_string(), port)
            }
            None => {
                let (host, port) = text.split_at(text.find(':').unwrap_or(text.len()));
                (name(host)?, port)
            }
        };
        let port = match port.strip_prefix(':') {
            Some(digits) => Some(digits.parse::<u16>().ok()?),
            None if port.is_empty() => None,
            None => return None,
        };
        Some(Authority { host: host.into(), port: port.filter(|port| ![80, 443].contains(port)) })
    }

    /// The address under which a client says (in its `Host` header) that it has reached the relay, if nobody far away can
    /// stand under that name.
    ///
    /// A `Host` header is the client's claim. Were it believed for names of the public DNS, whoever tricks a user into
    /// connecting to his own relay could pass our challenge on, and be that user here.
    pub fn guess(host_header: &str, client: IpAddr) -> Option<Self> {
        Authority::parse(host_header).filter(|authority| authority.is_local() && is_local_ip(client))
    }

    fn is_local(&self) -> bool {
        match self.host.parse::<IpAddr>() {
            Ok(ip) => is_local_ip(ip),
            Err(_) => !self.host.contains('.') || LOCAL_SUFFIXES.iter().any(|suffix| self.host.ends_with(suffix)),
        }
    }
}

/// A domain name or IPv4 address in lower case, without the dot at its end.
fn name(host: &str) -> Option<String> {
    let host = host.strip_suffix('.').unwrap_or(host);
    let fits = |c: char| c.is_alphanumeric() || matches!(c, '-' | '.' | '_');
    (!host.is_empty() && host.chars().all(fits)).then(|| host.to_lowercase())
}

/// Whether an address is of this machine, or of a network that the public internet does not reach.
fn is_local_ip(ip: IpAddr) -> bool {
    match ip.to_canonical() {
        // 100.64.0.0/10 is between provider and home, and what overlay networks such as Tailscale use.
        IpAddr::V4(ip) => ip.is_loopback() || ip.is_private() || ip.is_link_local() || is_shared(ip),
        IpAddr::V6(ip) => ip.is_loopback() || ip.is_unique_local() || ip.is_unicast_link_local(),
    }
}

fn is_shared(ip: Ipv4Addr) -> bool {
    let [first, second, ..] = ip.octets();
    first == 100 && second & 0xc0 == 64
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use proptest::prelude::*;

    use super::*;

    fn of(url: &str) -> Option<Authority> {
        Authority::of_url(url)
    }

    /// Spellings of one relay, and neighbours that are not it (T35).
    #[test]
    fn t35_spellings_of_one_relay() {
        let own = of("wss://relay.example.com").unwrap();
        for same in [
            "wss://relay.example.com/",
            "WSS://Relay.Example.COM",
            "wss://relay.example.com:443/",
            "ws://relay.example.com",
            "ws://relay.example.com:80",
            "wss://relay.example.com./nostr?x=y#z",
            " https://relay.example.com ",
        ] {
            assert_eq!(of(same).as_ref(), Some(&own), "{same}");
        }
        for other in [
            "wss://relay.example.com:7777",
            "wss://example.com",
            "wss://relay.example.com.evil.net",
            "wss://evilrelay.example.com",
            "wss://xrelay.example.com/relay.example.com",
            "wss://relay.example.com@evil.net",
            "wss://evil.net\\@relay.example.com",
            "wss://relay.example.com:x",
            "wss://relay.example.com:",
            "relay.example.com",
            "ftp://relay.example.com",
            "wss://",
            "",
        ] {
            assert_ne!(of(other).as_ref(), Some(&own), "{other}");
        }
        assert_eq!(of("ws://[::1]:7777"), of("WS://[0:0::1]:7777/x"));
        assert_ne!(of("ws://[::1]:7777"), of("ws://[::1]:7778"));
        assert_eq!(of("ws://[::1"), None);
        assert_eq!(of("ws://[::1]7777"), None);
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        /// Nothing that is written in a tag or header panics, and what is read is read the same from its own spelling.
        #[test]
        fn anything_can_be_read(text in "(wss?://)?[a-zA-Z0-9.:/@\\[\\]\\\\ é-]{0,40}") {
            let _ = Authority::guess(&text, IpAddr::from([127, 0, 0, 1]));
            if let Some(authority) = of(&text) {
                let host = match authority.host.contains(':') {
                    true => format!("[{}]", authority.host),
                    false => authority.host.to_string(),
                };
                let port = authority.port.map(|port| format!(":{port}")).unwrap_or_default();
                prop_assert_eq!(of(&format!("ws://{host}{port}")), Some(authority));
            }
        }
    }

    /// Guessed are names that no stranger can own, and only for clients that are near themselves (T35).
    #[test]
    fn t35_a_host_header_is_believed_for_local_names_only() {
        let near: IpAddr = "192.168.1.9".parse().unwrap();
        for local in ["localhost:7777", "127.0.0.1:7777", "[::1]:7777", "pi.local", "PI", "10.0.0.3", "100.100.1.1"] {
            assert!(Authority::guess(local, near).is_some(), "{local}");
            assert_eq!(Authority::guess(local, "203.0.113.9".parse().unwrap()), None, "{local} from far away");
        }
        for public in ["relay.example.com", "203.0.113.9:7777", "x.onion", "local", "[2001:db8::1]", "a b", ""] {
            let is_word = !public.contains('.') && !public.contains(':') && !public.contains(' ') && !public.is_empty();
            assert_eq!(Authority::guess(public, near).is_some(), is_word, "{public}");
        }
    }
}
