//! The connections that have shaken hands: to be counted, stopped, and closed when their address is blocked.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::config::IpRange;
use crate::relay::outbox::Outbox;

/// The open connections.
#[derive(Debug, Default)]
pub struct Open(Mutex<HashMap<u64, (Arc<Outbox>, IpAddr)>>);

impl Open {
    /// Adds a connection of a client at `ip`, until the result is dropped.
    pub fn enter(self: &Arc<Self>, outbox: &Arc<Outbox>, ip: IpAddr) -> Entered {
        self.lock().insert(outbox.connection, (outbox.clone(), ip));
        Entered { connection: outbox.connection, open: self.clone() }
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.lock().len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Tells all that the relay is stopping.
    pub fn stop_all(&self) {
        self.lock().values().for_each(|(outbox, _)| outbox.stop());
    }

    /// Has those of clients in this range closed.
    pub fn expel(&self, range: IpRange) {
        self.lock().values().filter(|(_, ip)| range.contains(*ip)).for_each(|(outbox, _)| outbox.expel());
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<u64, (Arc<Outbox>, IpAddr)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A connection's entry among the open ones.
#[derive(Debug)]
pub struct Entered {
    connection: u64,
    open: Arc<Open>,
}

impl Drop for Entered {
    fn drop(&mut self) {
        self.open.lock().remove(&self.connection);
    }
}
