use super::*;

#[test]
fn lists_of_processors_are_read_and_shown() {
    for (text, cpus, shown) in [
        ("0", &[0][..], "0"),
        ("2,4-6", &[2, 4, 5, 6], "2,4-6"),
        ("6,4-5,2,2,5", &[2, 4, 5, 6], "2,4-6"),
        ("1023", &[1023], "1023"),
    ] {
        let list: CpuList = text.parse().unwrap();
        assert_eq!((&list.0[..], list.to_string().as_str()), (cpus, shown), "{text}");
    }
    for text in ["", ",", "1,", "-1", "3-2", "1024", "0-1024", "a", "1-2-3", " 1", "99999999999999999999"] {
        assert_eq!(text.parse::<CpuList>(), Err(InvalidCpuList), "{text}");
    }
}
