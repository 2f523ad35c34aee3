//! The store on Postgres: the same suite and the same rules as the other stores, on a throw-away cluster.

use std::sync::Arc;

use crate::store_suite;
use crate::support::cluster::Cluster;

/// The conformance suite, unchanged.
#[test]
fn the_postgres_store_conforms() {
    store_suite::run_all(&|| Arc::new(Cluster::shared().store()));
}
