//! Keys from the terminal: for the guest's serial line, and Ctrl-A for the program.

use std::collections::VecDeque;
use std::io::{self, IsTerminal};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::termios::{
    InputModes, LocalModes, OptionalActions, SpecialCodeIndex, Termios, tcgetattr, tcsetattr,
};

/// Ctrl-A, with which keys for the program begin.
const ESCAPE: u8 = 1;

/// What a key asks of the program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ask {
    /// To end the run.
    End,
    /// To tell how far the run is.
    Progress,
    /// To tell the keys.
    Help,
}

/// Tells keys for the program from those for the guest.
#[derive(Debug, Default)]
pub(super) struct Parser {
    escaped: bool,
    typed: VecDeque<u8>,
}

impl Parser {
    /// Takes the bytes of keys. Returns what they ask of the program; the others wait for the guest.
    pub(super) fn take(&mut self, bytes: &[u8]) -> Vec<Ask> {
        let asks = bytes.iter().filter_map(|byte| self.key(*byte));
        asks.collect()
    }

    fn key(&mut self, byte: u8) -> Option<Ask> {
        if !std::mem::take(&mut self.escaped) {
            match byte {
                ESCAPE => self.escaped = true,
                byte => self.typed.push_back(byte),
            }
            return None;
        }
        match byte {
            b'x' | b'X' => Some(Ask::End),
            b's' | b'S' => Some(Ask::Progress),
            b'a' | ESCAPE => {
                self.typed.push_back(ESCAPE);
                None
            }
            _ => Some(Ask::Help),
        }
    }

    /// Hands the keys that wait to the guest, which says how many it took.
    pub(super) fn give(&mut self, take: impl FnOnce(&[u8]) -> usize) {
        let typed = self.typed.make_contiguous();
        if !typed.is_empty() {
            let taken = take(typed).min(typed.len());
            self.typed.drain(..taken);
        }
    }
}

/// Standard input as a terminal that hands on each key at once, as it is; until it is dropped.
pub(super) struct Keyboard {
    before: Termios,
}

impl Keyboard {
    /// Takes the terminal over, if standard input is one.
    pub(super) fn open() -> Option<Self> {
        let stdin = io::stdin();
        if !stdin.is_terminal() {
            return None;
        }
        let before = tcgetattr(&stdin).ok()?;
        let mut raw = before.clone();
        // Signals and editing are the guest's. Output stays as it is: the program's own lines go there, too.
        raw.local_modes -=
            LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG | LocalModes::IEXTEN;
        raw.input_modes -= InputModes::IXON | InputModes::ICRNL;
        raw.special_codes[SpecialCodeIndex::VMIN] = 1;
        raw.special_codes[SpecialCodeIndex::VTIME] = 0;
        tcsetattr(&stdin, OptionalActions::Now, &raw).ok()?;
        Some(Self { before })
    }

    /// Waits for keys, as long as that. `None` if there are no more.
    pub(super) fn wait(&self, time: Duration) -> Option<Vec<u8>> {
        // Not through the library's buffer, of which `poll` knows nothing.
        let stdin = io::stdin();
        let mut fds = [PollFd::new(&stdin, PollFlags::IN)];
        let time = time.try_into().ok();
        match poll(&mut fds, time.as_ref()) {
            Ok(0) | Err(rustix::io::Errno::INTR) => return Some(Vec::new()),
            Ok(_) => {}
            Err(_) => return None,
        }
        let mut bytes = [0; 256];
        match rustix::io::read(&stdin, &mut bytes) {
            Ok(0) | Err(_) => None,
            Ok(count) => Some(bytes[..count].to_vec()),
        }
    }
}

impl Drop for Keyboard {
    fn drop(&mut self) {
        // There is no other place to report an error.
        let _ = tcsetattr(io::stdin(), OptionalActions::Now, &self.before);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn given(parser: &mut Parser) -> Vec<u8> {
        let mut got = Vec::new();
        parser.give(|bytes| {
            got.extend_from_slice(bytes);
            bytes.len()
        });
        got
    }

    #[test]
    fn keys_go_to_the_guest_and_those_behind_ctrl_a_to_the_program() {
        let mut parser = Parser::default();
        assert_eq!(parser.take(b"ls\r\x03"), []);
        assert_eq!(given(&mut parser), b"ls\r\x03");
        assert_eq!(parser.take(b"\x01"), []);
        assert_eq!(parser.take(b"x"), [Ask::End]);
        assert_eq!(
            parser.take(b"a\x01sb\x01?\x01\x01\x01a"),
            [Ask::Progress, Ask::Help]
        );
        assert_eq!(given(&mut parser), b"ab\x01\x01");
    }

    #[test]
    fn keys_that_find_no_room_wait() {
        let mut parser = Parser::default();
        parser.take(b"abc");
        parser.give(|_| 2);
        assert_eq!(given(&mut parser), b"c");
        parser.give(|_| panic!("nothing waits"));
    }
}
