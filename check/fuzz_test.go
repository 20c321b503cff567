package check

import (
	"testing"

	"github.com/google/nftables/expr"
	"github.com/google/nftables/xt"
)

// A target of iptables that another program has made: whatever its bytes are, what it says of marks is said for the
// targets that write marks alone.
func FuzzTargetMarks(f *testing.F) {
	for _, info := range [][]byte{nil, make([]byte, 8), make([]byte, 12), append(make([]byte, 12), 2, 0, 0, 0), append(make([]byte, 14), 2, 0)} {
		for _, name := range []string{"MARK", "CONNMARK", "DNAT"} {
			for rev := range uint32(4) {
				f.Add(name, rev, info)
			}
		}
	}
	f.Fuzz(func(t *testing.T, name string, rev uint32, info []byte) {
		is := xt.Unknown(info)
		if m := targetMarks(&expr.Target{Name: name, Rev: rev, Info: &is}); m != (marks{}) && name != "MARK" && name != "CONNMARK" {
			t.Errorf("%s writes %+v", name, m)
		}
	})
}
