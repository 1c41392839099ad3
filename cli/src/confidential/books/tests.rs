//! Accounts with sums that agree, and with sums that do not.

use super::*;

fn books(calls: &[(&'static str, &'static str, u64)], pages_out: u64, keys_out: u64) -> Books {
    Books {
        pages_taken: 13,
        calls: calls
            .iter()
            .map(|(leaf, status, n)| ((leaf.to_string(), status.to_string()), *n))
            .collect(),
        pages_out,
        keys_out,
    }
}

fn calls(aug: u64, removed: u64) -> Vec<(&'static str, &'static str, u64)> {
    vec![
        ("TDH.MNG.CREATE", "SUCCESS", 3),
        ("TDH.MNG.CREATE", "OPERAND_BUSY", 2),
        ("TDH.MNG.KEY.FREEID", "SUCCESS", 3),
        ("TDH.MEM.PAGE.AUG", "SUCCESS", aug),
        ("TDH.MEM.PAGE.REMOVE", "SUCCESS", removed),
        ("TDH.PHYMEM.PAGE.RECLAIM", "SUCCESS", 3),
    ]
}

const CLEAN: Leaks = Leaks {
    pages_freed: 13,
    pages: 0,
    keys_freed: 3,
    keys: 0,
    unknown: 0,
};

#[test]
fn sums_that_agree_are_no_matter_and_what_was_before_does_not_count() {
    let after = books(&calls(10, 10), 0, 0);
    let account = Account::draw(Firmware::TdxModule, &Books::default(), &after, CLEAN);
    assert_eq!(account.disagreements, [""; 0]);
    assert_eq!(
        (account.calls, account.pages.given, account.keys.leased),
        (31, Some(13), 3)
    );
    assert_eq!(
        account.refused,
        [("TDH.MNG.CREATE OPERAND_BUSY".into(), 2)].into()
    );
    let nothing = Account::draw(Firmware::TdxModule, &after, &after, Leaks::default());
    assert_eq!(
        (nothing.calls, nothing.pages.given, nothing.keys.leased),
        (0, Some(0), 0)
    );
    assert!(nothing.disagreements.is_empty() && nothing.calls_by_name.is_empty());
}

#[test]
fn each_sum_that_does_not_agree_is_told() {
    let account = |books: &Books, leaks| {
        let account = Account::draw(Firmware::TdxModule, &Books::default(), books, leaks);
        account.disagreements.join("; ")
    };
    let kept = books(&calls(10, 9), 1, 0);
    // A leak that no teardown reported, and one that a teardown reported.
    assert!(account(&kept, CLEAN).contains("1 pages are out"));
    assert!(account(&kept, CLEAN).contains("gave 12 back, but 0 leaked"));
    let told = Leaks {
        pages: 1,
        pages_freed: 12,
        ..CLEAN
    };
    assert_eq!(account(&kept, told), "");
    let forgot = Leaks {
        pages_freed: 4,
        ..CLEAN
    };
    assert!(
        account(&books(&calls(10, 10), 0, 0), forgot)
            .contains("13 pages were taken from the host, 4 were freed and 0 leaked")
    );
    let lost = Leaks {
        keys_freed: 2,
        ..CLEAN
    };
    assert!(account(&books(&calls(10, 10), 0, 1), lost).contains("3 keys were put into use"));
    assert!(account(&books(&calls(10, 10), 0, 1), CLEAN).contains("1 keys are out"));
}
