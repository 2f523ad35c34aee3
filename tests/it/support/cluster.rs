//! A throw-away Postgres cluster for the tests of the store on Postgres: one a test process, a database a store.
//!
//! It listens on a Unix socket in a directory of its own, and a shell that waits for this process to end stops and
//! removes it, however the process ends. As root it runs as the user `postgres`, since Postgres refuses root.

use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

use sledge::store::postgres::{Options, PostgresStore};

/// `$1`: directory of the programs, `$2`: directory of the cluster, `$3`: further lines of its settings. Says `up` when it is, and
/// goes on until its input ends.
const RUN: &str = r#"
as() { if [ "$(id -u)" = 0 ]; then runuser -u postgres -- "$@"; else "$@"; fi; }
if [ "$(id -u)" = 0 ]; then chown postgres "$2"; fi
cd "$2" || exit 1
as "$1/initdb" -D "$2/data" -U postgres -A trust -E UTF8 --locale=C.UTF-8 -N >"$2/initdb.log" 2>&1 </dev/null || { cat "$2/initdb.log" >&2; exit 1; }
printf "listen_addresses = ''\nunix_socket_directories = '%s'\n%s\n" "$2" "$3" >>"$2/data/postgresql.conf"
as "$1/pg_ctl" -D "$2/data" -w -t 60 -l "$2/log" start >/dev/null 2>&1 </dev/null || { cat "$2/log" >&2; exit 1; }
echo up
read -r _
for try in 1 2 3 4 5; do
  for data in "$2/data" "$2/standby"; do as "$1/pg_ctl" -D "$data" -m immediate stop >/dev/null 2>&1; done
  # A server that the test was just starting again may come up behind the first stop.
  rm -rf "$2" 2>/dev/null && [ ! -e "$2" ] && exit
  sleep 1
done
"#;

/// A cluster; stopped and removed with its last user, or with the process.
pub struct Cluster {
    dir: PathBuf,
    bin: PathBuf,
    shell: Child,
    databases: AtomicU32,
}

impl Cluster {
    /// The cluster that the tests of this process share. Durability is for the tests that kill it: they have their own.
    pub fn shared() -> &'static Cluster {
        static SHARED: OnceLock<Cluster> = OnceLock::new();
        SHARED.get_or_init(|| Cluster::start("fsync = off\nmax_connections = 300\nshared_buffers = 64MB"))
    }

    /// Starts one with settings of its own, lines of `postgresql.conf`.
    pub fn start(settings: &str) -> Cluster {
        let bin = programs();
        let dir = tempfile::Builder::new().prefix("sledge-pg-").tempdir().expect("a temporary directory").keep();
        // The server is another user when the test is root.
        std::fs::set_permissions(&dir, PermissionsExt::from_mode(0o711)).expect("a directory of ours");
        let mut command = Command::new("sh");
        command.arg("-c").arg(RUN).arg("cluster").args([&bin, &dir]).arg(settings);
        let shell = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::inherit()).spawn();
        let mut shell = shell.expect("sh is there");
        let mut said = String::new();
        let stdout = shell.stdout.as_mut().expect("it is piped");
        BufReader::new(stdout).read_line(&mut said).expect("a line of text");
        assert_eq!(said, "up\n", "the Postgres cluster in {} did not start; see above", dir.display());
        Cluster { dir, bin, shell, databases: AtomicU32::new(0) }
    }

    /// The URL of a new, empty database.
    pub fn database(&self) -> String {
        let name = format!("relay_{}", self.databases.fetch_add(1, Ordering::Relaxed));
        self.sql("postgres", &format!("CREATE DATABASE {name}"));
        self.url(&name)
    }

    /// The URL of a database.
    pub fn url(&self, name: &str) -> String {
        format!("postgres:///{name}?host={}&user=postgres", self.dir.display())
    }

    /// A store in a new database.
    pub fn store(&self) -> PostgresStore {
        open(&self.database())
    }

    /// Runs SQL as the superuser; what it printed.
    #[track_caller]
    pub fn sql(&self, database: &str, sql: &str) -> String {
        self.sql_at(5432, database, sql)
    }

    /// Runs SQL on the standby.
    #[track_caller]
    pub fn standby_sql(&self, database: &str, sql: &str) -> String {
        self.sql_at(5433, database, sql)
    }

    #[track_caller]
    fn sql_at(&self, port: u16, database: &str, sql: &str) -> String {
        let mut command = Command::new(self.bin.join("psql"));
        command.args(["-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-U", "postgres", "-d", database, "-c", sql]);
        let ran = command.arg("-h").arg(&self.dir).arg("-p").arg(port.to_string()).output().expect("psql is there");
        assert!(ran.status.success(), "{sql}: {}", String::from_utf8_lossy(&ran.stderr));
        String::from_utf8(ran.stdout).expect("psql writes text").trim().to_owned()
    }

    /// Stops the server at once, as a crash does, and starts it again after `meanwhile`.
    pub fn restart(&self, meanwhile: impl FnOnce()) {
        self.control("data", &["-m", "immediate", "stop"]);
        meanwhile();
        self.start_again("data");
    }

    fn start_again(&self, data: &str) {
        self.control(data, &["-w", "-t", "60", "-l", &format!("{}/{data}.log", self.dir.display()), "start"]);
    }

    /// Makes a streaming standby, one a cluster, and starts it.
    pub fn start_standby(&self) {
        let script = r#"as() { if [ "$(id -u)" = 0 ]; then runuser -u postgres -- "$@"; else "$@"; fi; }
            cd "$2" && as "$1/pg_basebackup" -h "$2" -U postgres -D "$2/standby" -R -X stream -c fast \
            && echo "port = 5433" >>"$2/standby/postgresql.conf""#;
        let copied = Command::new("sh").arg("-c").arg(script).arg("standby").args([&self.bin, &self.dir]).output();
        let copied = copied.expect("sh is there");
        assert!(copied.status.success(), "pg_basebackup: {}", String::from_utf8_lossy(&copied.stderr));
        self.start_again("standby");
    }

    /// Stops the standby at once.
    pub fn stop_standby(&self) {
        self.control("standby", &["-m", "immediate", "stop"]);
    }

    /// Has the primary wait for the standby with every commit.
    pub fn wait_for_standby(&self) {
        self.sql("postgres", "ALTER SYSTEM SET synchronous_standby_names = '*'");
        self.sql("postgres", "SELECT pg_reload_conf()");
        while self.sql("postgres", "SELECT count(*) FROM pg_stat_replication WHERE sync_state = 'sync'") != "1" {}
    }

    /// Kills the primary and makes the standby one.
    pub fn fail_over(&self) {
        self.control("data", &["-m", "immediate", "stop"]);
        self.control("standby", &["-w", "promote"]);
    }

    /// The URL of a database, wherever the primary is.
    pub fn either_url(&self, name: &str) -> String {
        format!("{}&port=5432,5433", self.url(name))
    }

    /// The URL of a database on the standby.
    pub fn standby_url(&self, name: &str) -> String {
        format!("{}&port=5433", self.url(name))
    }

    fn control(&self, data: &str, args: &[&str]) {
        let script = r#"as() { if [ "$(id -u)" = 0 ]; then runuser -u postgres -- "$@"; else "$@"; fi; }
                        bin=$1; data=$2; shift 2; cd "$data" && as "$bin/pg_ctl" -D "$data" "$@" >/dev/null 2>&1 </dev/null"#;
        let mut command = Command::new("sh");
        command.arg("-c").arg(script).arg("control").args([&self.bin, &self.dir.join(data)]).args(args);
        assert!(command.status().expect("sh is there").success(), "pg_ctl {args:?}");
    }

    /// Makes a folder the server's own, which as root is another user.
    pub fn own(&self, folder: &Path) {
        let script = "if [ \"$(id -u)\" = 0 ]; then chown postgres \"$1\"; fi";
        let owned = Command::new("sh").arg("-c").arg(script).arg("own").arg(folder).status();
        assert!(owned.expect("sh is there").success());
    }

    /// Where its files are.
    pub fn dir(&self) -> &Path {
        &self.dir
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        drop(self.shell.stdin.take());
        let _ = self.shell.wait();
    }
}

/// Opens the store in a database.
pub fn open(url: &str) -> PostgresStore {
    PostgresStore::open(&Options::new(url)).expect("a database")
}

/// The directory of the newest installed server's programs.
fn programs() -> PathBuf {
    if let Some(dir) = std::env::var_os("SLEDGE_TEST_POSTGRES_BIN") {
        return dir.into();
    }
    let versions = std::fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    let mut found: Vec<(u32, PathBuf)> = versions
        .filter_map(|entry| Some((entry.file_name().to_str()?.parse().ok()?, entry.path().join("bin"))))
        .filter(|(_, bin)| bin.join("initdb").exists())
        .collect();
    found.sort();
    let on_path = || std::env::split_paths(&std::env::var_os("PATH")?).find(|dir| dir.join("initdb").exists());
    match found.pop().map(|(_, bin)| bin).or_else(on_path) {
        Some(bin) => bin,
        None => panic!(
            "no PostgreSQL server is installed, which the tests of the store on Postgres need (Debian: apt-get install \
             postgresql); SLEDGE_TEST_POSTGRES_BIN names the directory of its programs"
        ),
    }
}
