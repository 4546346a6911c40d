//! [`over_both_rings`].

/// Tests that run with a split ring and with a packed one.
macro_rules! over_both_rings {
    ($($test:ident),+ $(,)?) => {
        mod split {
            $(#[test] fn $test() { super::$test(); })+
        }
        mod packed {
            $(#[test] fn $test() { $crate::support::blk::over_packed_rings(super::$test); })+
        }
    };
}
