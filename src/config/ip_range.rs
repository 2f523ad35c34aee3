//! A range of IP addresses, as `192.0.2.7`, `10.0.0.0/8` or `2001:db8::/32`.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr};
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// Addresses that share their first bits with `start`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IpRange {
    start: IpAddr,
    prefix_bits: u8,
}

/// The text is neither an address nor a range.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is neither an IP address nor a range such as 10.0.0.0/8")]
pub struct IpRangeError(String);

impl IpRange {
    /// Does the range hold this address? An IPv4 address in IPv6 clothes (`::ffff:10.0.0.1`, as a socket on `[::]`
    /// reports it) counts as IPv4.
    pub fn contains(self, ip: IpAddr) -> bool {
        let ip = ip.to_canonical();
        if ip.is_ipv4() != self.start.is_ipv4() {
            return false;
        }
        // Zero bits shared cannot be asked by a shift, which would be as wide as the number.
        let differing = address_bits(ip) ^ address_bits(self.start);
        self.prefix_bits == 0 || differing >> (width_bits(ip) - self.prefix_bits) == 0
    }
}

/// The part of an address that stands for one subscriber line: all of IPv4, the first 64 bits of IPv6.
pub fn subscriber_line(ip: IpAddr) -> IpAddr {
    match ip.to_canonical() {
        IpAddr::V6(ip) if !ip.is_loopback() => {
            let [a, b, c, d, ..] = ip.segments();
            IpAddr::V6(Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0))
        }
        ip => ip,
    }
}

fn width_bits(ip: IpAddr) -> u8 {
    if ip.is_ipv4() { 32 } else { 128 }
}

fn address_bits(ip: IpAddr) -> u128 {
    match ip {
        IpAddr::V4(v4) => u128::from(v4.to_bits()),
        IpAddr::V6(v6) => v6.to_bits(),
    }
}

impl FromStr for IpRange {
    type Err = IpRangeError;

    fn from_str(text: &str) -> Result<IpRange, IpRangeError> {
        let refused = || IpRangeError(text.to_owned());
        let (address, prefix) = match text.split_once('/') {
            Some((address, prefix)) => (address, Some(prefix)),
            None => (text, None),
        };
        let start: IpAddr = address.parse().map_err(|_| refused())?;
        let prefix_bits = match prefix {
            Some(digits) => digits.parse().map_err(|_| refused())?,
            None => width_bits(start),
        };
        if prefix_bits > width_bits(start) {
            return Err(refused());
        }
        Ok(IpRange { start, prefix_bits })
    }
}

impl fmt::Display for IpRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.prefix_bits == width_bits(self.start) {
            write!(f, "{}", self.start)
        } else {
            write!(f, "{}/{}", self.start, self.prefix_bits)
        }
    }
}

impl<'de> Deserialize<'de> for IpRange {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<IpRange, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

impl Serialize for IpRange {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    /// Both families, the edges of a prefix, and the widths 0 and full.
    #[test]
    fn a_range_holds_its_addresses_and_no_others() {
        for (range, inside, outside) in [
            ("10.0.0.0/8", "10.255.255.255", "11.0.0.0"),
            ("10.1.2.3/8", "10.0.0.0", "9.255.255.255"),
            ("192.0.2.7", "192.0.2.7", "192.0.2.6"),
            ("0.0.0.0/0", "255.1.2.3", "::1"),
            ("::/0", "2001:db8::1", "192.0.2.7"),
            ("2001:db8::/32", "2001:db8:ffff::", "2001:db9::"),
            ("192.0.2.0/31", "::ffff:192.0.2.1", "::ffff:192.0.2.2"),
        ] {
            let parsed: IpRange = range.parse().unwrap();
            assert!(parsed.contains(inside.parse().unwrap()), "{inside} in {range}");
            assert!(!parsed.contains(outside.parse().unwrap()), "{outside} not in {range}");
        }
    }

    /// Wrong spellings are refused by name, never read as something else.
    #[test]
    fn wrong_ranges_are_refused() {
        for text in ["", "localhost", "10.0.0.0/33", "::/129", "10.0.0.0/", "10.0.0.0/-1", "10.0.0/8"] {
            assert_eq!(text.parse::<IpRange>(), Err(IpRangeError(text.to_owned())));
        }
    }

    /// The printed form is the one a file takes.
    #[test]
    fn a_range_prints_as_it_is_written() {
        for text in ["10.0.0.0/8", "192.0.2.7", "::1", "2001:db8::/32"] {
            assert_eq!(text.parse::<IpRange>().unwrap().to_string(), text);
        }
    }
}
