//! Records of a run: writing one, and serving the program from one.

use std::fmt::Display;
use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::sync::OnceLock;

use kvm_ops_softkvm::{Mismatch, Player};

use crate::{clock, cpuid, own};

/// The exit code of a program that is not the record's.
const DIFFERS: libc::c_int = 3;

/// The file that the environment names for the record of this run. `None` without one, and in children, which are not recorded.
pub(crate) fn out() -> Option<Box<dyn Write + Send>> {
    let path = std::env::var_os("KVM_OPS_RECORD").filter(|_| !own::is_child())?;
    // Of two programs of a run that open a device, the second would spoil the record of the first.
    let made = File::create_new(&path).map_err(|error| named(Path::new(&path), error));
    clock::begin();
    Some(Box::new(or_exit(made)))
}

fn named(path: &Path, error: impl Display) -> String {
    format!("{}: {error}", path.display())
}

/// The value, or the end of the program, which would otherwise run as if it were not recorded.
pub(crate) fn or_exit<T>(made: Result<T, impl Display>) -> T {
    made.unwrap_or_else(|error| {
        eprintln!("kvm-ops record: {error}");
        std::process::exit(2);
    })
}

/// The player of the record that the environment names. A child has none.
pub(crate) fn player() -> Option<&'static Player> {
    static PLAYER: OnceLock<Option<Player>> = OnceLock::new();
    let player = PLAYER.get_or_init(|| {
        let path = std::env::var_os("KVM_OPS_REPLAY")?;
        let text = std::fs::read_to_string(&path).map_err(|error| named(Path::new(&path), error));
        let player = Player::new(&or_exit(text), differs);
        clock::begin();
        let player = or_exit(player.map_err(|error| named(Path::new(&path), error)));
        cpuid::take_over(player.encryption_leaf());
        // SAFETY: the handler reads what is never freed.
        unsafe { libc::atexit(ends) };
        Some(player)
    });
    player.as_ref().filter(|_| !own::is_child())
}

/// Ends the program at the first call that differs. Handlers of the end are not run: they may wait for other threads.
fn differs(mismatch: &Mismatch) {
    eprintln!("kvm-ops replay: {mismatch}");
    // SAFETY: ends the process, and touches no memory.
    unsafe { libc::_exit(DIFFERS) };
}

/// The program ends: the record should too.
extern "C" fn ends() {
    let Some(player) = player() else { return };
    let (calls, made) = player.progress();
    if made != calls {
        eprintln!("kvm-ops replay: the program ends after {made} of {calls} calls");
        // SAFETY: as above.
        unsafe { libc::_exit(DIFFERS) };
    }
}
