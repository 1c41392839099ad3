use super::Exec;
use iced_x86::Instruction;
pub(super) fn select(_: &Instruction) -> Option<Exec> {
    None
}
