use super::Exec;
use iced_x86::Mnemonic;
pub(super) fn select(_: Mnemonic) -> Option<Exec> {
    None
}
