//! Keys of a terminal, and the program's own behind Ctrl-A.

mod common;

use std::fs::File;
use std::io::{Read, Write};
use std::process::{Child, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use tempfile::TempDir;

/// 16-bit code that sends back what comes on the serial line, and ends at a `q`:
/// next: mov dx, 0x3fd; in al, dx; test al, 1; jz next; mov dx, 0x3f8; in al, dx; cmp al, 'q'; je end; out dx, al;
/// jmp next; end: mov dx, 0xf4; mov al, 0; out dx, al; hlt
const ECHO: [u8; 27] = [
    0xba, 0xfd, 0x03, 0xec, 0xa8, 0x01, 0x74, 0xf8, 0xba, 0xf8, 0x03, 0xec, 0x3c, b'q', 0x74, 0x03,
    0xee, 0xeb, 0xed, 0xba, 0xf4, 0x00, 0xb0, 0x00, 0xee, 0xf4, 0xf4,
];

/// The program on a terminal of its own.
struct Session {
    child: Child,
    keyboard: File,
    screen: Arc<Mutex<String>>,
    _directory: TempDir,
}

impl Session {
    fn start(more: &[&str]) -> Self {
        let directory = TempDir::new().unwrap();
        let code = directory.path().join("echo.bin");
        std::fs::write(&code, ECHO).unwrap();
        let controller = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&controller).unwrap();
        unlockpt(&controller).unwrap();
        let name = ptsname(&controller, Vec::new()).unwrap();
        let open = || {
            let path = name.to_str().unwrap();
            let terminal = File::options().read(true).write(true).open(path);
            Stdio::from(terminal.unwrap())
        };
        let child = common::program()
            .args([
                "run",
                code.to_str().unwrap(),
                "--format",
                "flat",
                "--host",
                "sim",
            ])
            .args(["--memory", "1M", "--timeout", "2m"])
            .args(more)
            .stdin(open())
            .stdout(open())
            .stderr(open())
            .spawn()
            .unwrap();
        let keyboard = File::from(controller);
        let screen = Arc::<Mutex<String>>::default();
        let (mut reader, shown) = (keyboard.try_clone().unwrap(), Arc::clone(&screen));
        thread::spawn(move || {
            let mut bytes = [0; 1024];
            // An error tells that the program has closed the terminal.
            while let Ok(count @ 1..) = reader.read(&mut bytes) {
                let text = String::from_utf8_lossy(&bytes[..count]);
                shown.lock().unwrap().push_str(&text);
            }
        });
        let session = Self {
            child,
            keyboard,
            screen,
            _directory: directory,
        };
        session.shows("Ctrl-A x ends");
        session
    }

    fn types(&mut self, keys: &[u8]) {
        self.keyboard.write_all(keys).unwrap();
    }

    /// Waits until a text is on the screen.
    fn shows(&self, text: &str) {
        let start = Instant::now();
        loop {
            let screen = self.screen.lock().unwrap().clone();
            if screen.contains(text) {
                return;
            }
            assert!(
                start.elapsed() < Duration::from_secs(60),
                "{text:?}: {screen}"
            );
            thread::sleep(Duration::from_millis(10));
        }
    }

    fn ends(mut self) -> Option<i32> {
        self.child.wait().unwrap().code()
    }
}

#[test]
fn keys_reach_the_guest_as_they_are_and_its_answer_the_screen() {
    let mut session = Session::start(&[]);
    session.types(b"hel");
    session.shows("hel");
    // Ctrl-C is a key, too, and Ctrl-A a is Ctrl-A.
    session.types(b"<\x03\x01a>");
    session.shows("<\x03\x01>");
    session.types(b"q");
    assert_eq!(session.ends(), Some(0));
}

#[test]
fn ctrl_a_s_tells_how_far_the_run_is_and_ctrl_a_x_ends_it() {
    let mut session = Session::start(&[]);
    session.types(b"\x01s");
    session.shows("M instructions, ");
    session.types(b"\x01h\x01x");
    assert_eq!(session.ends(), Some(0));
}

#[test]
fn a_text_on_the_console_ends_the_run() {
    let mut session = Session::start(&["--until", "end now"]);
    session.types(b"end n");
    session.shows("end n");
    session.types(b"ow");
    assert_eq!(session.ends(), Some(0));
}
