//! The store behind pgbouncer.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Instant;

use serde_json::json;
use sledge::store::postgres::{Options, PostgresStore};
use sledge::store::{Store, StoreError};

use crate::support::client::PATIENCE;
use crate::support::cluster::Cluster;
use crate::support::stores::{newest, query, read};
use crate::support::{Keys, NOW, Relay, verified};

/// A pooler before a cluster; killed when dropped.
struct Pooler {
    child: Child,
    dir: PathBuf,
}

impl Pooler {
    /// Starts one in this mode, with so many connections to the server for a database.
    fn start(cluster: &Cluster, mode: &str, connections: u32) -> Pooler {
        let dir = cluster.dir().join(mode);
        let settings = format!(
            "[databases]\n* = host={} user=postgres\n[pgbouncer]\nlisten_port = 6432\nunix_socket_dir = {}\n\
             auth_type = any\npool_mode = {mode}\ndefault_pool_size = {connections}\n\
             ignore_startup_parameters = extra_float_digits\nlogfile = {2}/log\n",
            cluster.dir().display(),
            dir.display(),
            dir.display(),
        );
        std::fs::create_dir(&dir).unwrap();
        std::fs::write(dir.join("ini"), settings).unwrap();
        cluster.own(&dir);
        let script = "as() { if [ \"$(id -u)\" = 0 ]; then exec setpriv --reuid=postgres --regid=postgres --clear-groups \"$@\"; else exec \"$@\"; fi; }
                      PATH=$PATH:/usr/sbin; command -v pgbouncer >/dev/null || { echo 'pgbouncer is not installed' >&2; exit 1; }
                      as pgbouncer -q \"$1/ini\"";
        let mut command = Command::new("sh");
        command.arg("-c").arg(script).arg("pooler").arg(&dir).stdin(Stdio::null()).stdout(Stdio::null());
        let mut pooler = Pooler { child: command.spawn().expect("sh is there"), dir };
        let began = Instant::now();
        while !pooler.socket().exists() {
            let ended = pooler.child.try_wait().unwrap();
            assert!(ended.is_none() && began.elapsed() < PATIENCE, "pgbouncer does not start: {ended:?}");
            std::thread::yield_now();
        }
        pooler
    }

    fn socket(&self) -> PathBuf {
        Path::new(&self.dir).join(".s.PGSQL.6432")
    }

    fn url(&self, database: &str) -> String {
        format!("postgres:///{database}?host={}&port=6432&user=postgres", self.dir.display())
    }
}

impl Drop for Pooler {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn name_of(url: &str) -> &str {
    url.split(['/', '?']).nth(3).unwrap()
}

/// In session mode everything works, notifications included.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pooler_in_session_mode_changes_nothing() {
    let cluster = Cluster::start("");
    let url = cluster.database();
    let pooler = Pooler::start(&cluster, "session", 20);
    let seldom = Options { poll: std::time::Duration::from_secs(3_600), ..Options::new(pooler.url(name_of(&url))) };
    let relay = async || Relay::over(Arc::new(PostgresStore::open(&seldom).unwrap())).await;
    let (one, other) = (relay().await, relay().await);
    let (mut writer, mut reader) = (one.client().await, other.client().await);
    reader.req("all", &[json!({"limit": 0})]).await;
    let note = Keys::new(1).note(NOW, "through the pooler");
    writer.store(&note).await;
    assert_eq!(reader.live("all").await["id"], json!(note.id.to_hex()));
    assert_eq!(reader.query_ids(json!({})).await, [note.id.to_hex()]);
    one.stop().await;
    other.stop().await;
}

/// In transaction mode a pooler that forgets prepared statements is named as the reason, with what to do; one that keeps
/// them does not stand in the way.
#[test]
fn a_pooler_in_transaction_mode_works_or_is_named() {
    let cluster = Cluster::start("");
    let url = cluster.database();
    let pooler = Pooler::start(&cluster, "transaction", 1);
    let note = Keys::new(1).note(NOW, "");
    let use_it = || -> Result<usize, StoreError> {
        let store = PostgresStore::open(&Options::new(pooler.url(name_of(&url))))?;
        store.apply(&[verified(&note)], NOW)?;
        store.contains(&note.id)?;
        Ok(read(&store, query(&[newest("{}", 10)], NOW), usize::MAX).0.len())
    };
    for _ in 0..3 {
        match use_it() {
            Ok(found) => assert_eq!(found, 1),
            Err(error) => {
                let text = error.to_string();
                assert!(text.contains("session mode") && text.contains("max_prepared_statements"), "{text}");
                return;
            }
        }
    }
}
