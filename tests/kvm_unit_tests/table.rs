//! The table of results in docs/kvm-unit-tests.md: `| run | here | others... |`.

const PATH: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/kvm-unit-tests.md");
const HEADING: &str = "| run | here |";

/// The page, and the lines of its table.
pub(crate) struct Page {
    before: String,
    rows: Vec<Vec<String>>,
    after: String,
}

impl Page {
    pub(crate) fn open() -> Self {
        Self::parse(&std::fs::read_to_string(PATH).expect("the page"))
    }

    fn parse(text: &str) -> Self {
        let heading = text.find(HEADING).expect("the table");
        // The line of dashes ends the heading.
        let lines = text[heading..].split_inclusive('\n');
        let start = heading + lines.take(2).map(str::len).sum::<usize>();
        let table = text[start..].split_inclusive('\n');
        let table: Vec<&str> = table.take_while(|line| line.starts_with('|')).collect();
        let end = start + table.iter().map(|line| line.len()).sum::<usize>();
        let cells = |line: &str| {
            let inner = line.trim().trim_matches('|');
            inner
                .split('|')
                .map(|cell| cell.trim().to_owned())
                .collect()
        };
        Self {
            before: text[..start].to_owned(),
            rows: table.into_iter().map(cells).collect(),
            after: text[end..].to_owned(),
        }
    }

    /// Puts a result into the table. `Some` tells how it differs.
    pub(crate) fn record(&mut self, run: &str, result: &str) -> Option<String> {
        let columns = self.rows.first().map_or(4, Vec::len);
        let known = self.rows.iter_mut().find(|row| row[0] == run);
        let row = match known {
            Some(row) => row,
            None => {
                let mut row = vec![String::new(); columns];
                row[0] = run.to_owned();
                self.rows.push(row);
                self.rows.last_mut().expect("just pushed")
            }
        };
        let was = std::mem::replace(&mut row[1], result.to_owned());
        (was != result).then(|| format!("{run}: {result}, and the page says {was:?}"))
    }

    fn text(&self) -> String {
        let line = |row: &Vec<String>| format!("| {} |\n", row.join(" | "));
        let rows: String = self.rows.iter().map(line).collect();
        [self.before.as_str(), &rows, &self.after].concat()
    }

    /// Compares, or with `BLESS=1` writes the page.
    pub(crate) fn close(self, different: &[String]) {
        if std::env::var_os("BLESS").is_some() {
            std::fs::write(PATH, self.text()).expect("the page can be written");
        } else {
            assert!(different.is_empty(), "{different:#?}; BLESS=1 writes them");
        }
    }
}

#[test]
fn a_result_replaces_its_cell_and_nothing_else() {
    let text = "# Title\n\n| run | here | TCG |\n|---|---|---|\n| a | pass 1P | x |\n| b | skip 0P | y |\n\nEnd\n";
    let mut page = Page::parse(text);
    assert_eq!(page.text(), text);
    assert_eq!(page.record("a", "pass 1P"), None);
    assert!(page.record("b", "pass 2P").is_some());
    assert!(page.record("c", "skip 0P").is_some());
    let expected = text.replace(
        "| b | skip 0P | y |\n",
        "| b | pass 2P | y |\n| c | skip 0P |  |\n",
    );
    assert_eq!(page.text(), expected);
}
