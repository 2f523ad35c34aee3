//! How many connections one address may have.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};

use crate::config::subscriber_line;

/// Counts the connections of each address.
#[derive(Clone, Debug, Default)]
pub struct Places {
    taken: Arc<Mutex<HashMap<IpAddr, usize>>>,
}

/// One connection's place; free again when dropped.
#[derive(Debug)]
pub struct Place {
    of: Option<(IpAddr, Places)>,
}

impl Places {
    /// A place for `ip`, if it has less than `per_ip_max` (0 = no limit). Loopback has always one.
    pub fn take(&self, ip: IpAddr, per_ip_max: usize) -> Option<Place> {
        let ip = subscriber_line(ip);
        if per_ip_max == 0 || ip.is_loopback() {
            return Some(Place::unlimited());
        }
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let count = taken.entry(ip).or_insert(0);
        if *count >= per_ip_max {
            return None;
        }
        *count += 1;
        Some(Place { of: Some((ip, self.clone())) })
    }
}

impl Place {
    /// A place that is taken from nobody.
    pub fn unlimited() -> Place {
        Place { of: None }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let Some((ip, places)) = self.of.take() else {
            return;
        };
        let mut taken = places.taken.lock().unwrap_or_else(PoisonError::into_inner);
        if let Entry::Occupied(mut entry) = taken.entry(ip) {
            *entry.get_mut() -= 1;
            if *entry.get() == 0 {
                entry.remove();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    /// Places are counted an address, given back on drop, and never refused to loopback.
    #[test]
    fn places_are_counted_and_given_back() {
        let places = Places::default();
        let ip = |text: &str| text.parse::<IpAddr>().unwrap();
        let first = places.take(ip("192.0.2.1"), 2);
        let second = places.take(ip("::ffff:192.0.2.1"), 2);
        assert!(first.is_some() && second.is_some());
        assert!(places.take(ip("192.0.2.1"), 2).is_none(), "IPv4 in IPv6 is the same address");
        assert!(places.take(ip("192.0.2.2"), 2).is_some());
        drop(first);
        assert!(places.take(ip("192.0.2.1"), 2).is_some());
        drop(second);
        assert!(places.taken.lock().unwrap().is_empty());
        let loopback: Vec<_> = (0..9).filter_map(|_| places.take(ip("127.0.0.1"), 2)).collect();
        assert_eq!(loopback.len(), 9);
    }

    /// The many addresses of one IPv6 line share its places; 0 is no limit.
    #[test]
    fn an_ipv6_line_is_one_address() {
        let places = Places::default();
        let _first = places.take("2001:db8:1:2::1".parse().unwrap(), 1).unwrap();
        assert!(places.take("2001:db8:1:2:ffff::9".parse().unwrap(), 1).is_none());
        assert!(places.take("2001:db8:1:3::1".parse().unwrap(), 1).is_some());
        let free = Places::default();
        let many: Vec<_> = (0..99).filter_map(|_| free.take("192.0.2.1".parse().unwrap(), 0)).collect();
        assert_eq!(many.len(), 99);
    }
}
