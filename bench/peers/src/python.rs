//! Keeps the Python tool running, so that its start is not timed.

use std::error::Error;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use crate::image::Image;
use crate::{Technology, Time};

const PACKAGE: &str = "sev-snp-measure";
const VERSION: &str = "0.0.13";

/// A running `sev-snp-measure` process. Dropping this ends it.
pub(crate) struct Tool {
    child: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
}

impl Tool {
    /// Installs the tool into a virtual environment, unless it is there already, and starts it.
    pub(crate) fn start(environment: &Path) -> Result<Self, Box<dyn Error>> {
        let python = environment.join("bin/python");
        if !installed(&python) {
            run(Command::new("python3")
                .args(["-m", "venv"])
                .arg(environment))?;
            let package = format!("{PACKAGE}=={VERSION}");
            run(Command::new(&python).args(["-m", "pip", "install", "--quiet", &package]))?;
        }
        let mut child = Command::new(&python)
            .args(["-c", include_str!("driver.py")])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let input = child.stdin.take();
        let output = BufReader::new(child.stdout.take().ok_or("the tool has no output")?);
        Ok(Self {
            child,
            input,
            output,
        })
    }

    /// The tool's name in the tables.
    pub(crate) fn name() -> String {
        format!("{PACKAGE} {VERSION}")
    }

    /// Returns the time that the tool took, and the digest.
    pub(crate) fn digest(
        &mut self,
        technology: Technology,
        image: &Image,
    ) -> Result<(Time, Vec<u8>), Box<dyn Error>> {
        let input = self.input.as_mut().ok_or("the tool has ended")?;
        writeln!(
            input,
            "{} {} {} {}",
            technology.argument(),
            image.file.display(),
            crate::VCPUS,
            crate::SIGNATURE
        )?;
        let mut line = String::new();
        self.output.read_line(&mut line)?;
        let words: Vec<&str> = line.split_whitespace().collect();
        let [clock, processor, digest] = words[..] else {
            return Err(format!("the tool answered {line:?}").into());
        };
        let time = Time {
            clock: clock.parse()?,
            processor: processor.parse()?,
        };
        Ok((time, hex::decode(digest)?))
    }
}

impl Drop for Tool {
    fn drop(&mut self) {
        // The tool ends when its input is closed.
        self.input = None;
        let _ = self.child.wait();
    }
}

fn installed(python: &Path) -> bool {
    Command::new(python)
        .args(["-c", "import sevsnpmeasure"])
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}

fn run(command: &mut Command) -> Result<(), Box<dyn Error>> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command
        .output()
        .map_err(|error| format!("{program}: {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let last = said.lines().last().unwrap_or_default();
    Err(format!("{program}: {}: {last}", output.status).into())
}
