package operator

import (
	"fmt"
	"io"
	"net/netip"

	"github.com/egret-project/egret/check"
)

// CheckNode writes what there is to say of this node (see check.Run) in a format (see CheckFormat). An error says that the agent cannot
// work here.
func CheckNode(nodeIP netip.Addr, format string, w io.Writer) error {
	findings, err := check.Run(nodeIP)
	if err != nil {
		return err
	}
	l := listing{header: "CHECK LEVEL FOUND FOR CONSEQUENCE"}
	missing := 0
	for _, f := range findings {
		l.records = append(l.records, f)
		l.rows = append(l.rows, []string{f.Check, string(f.Level), f.Found, f.For, dash(f.Consequence)})
		if f.Level == check.Missing {
			missing++
		}
	}
	if err := l.write(format, w); err != nil {
		return err
	}
	if missing > 0 {
		return fmt.Errorf("the agent cannot work here: %d of what it needs is missing", missing)
	}
	return nil
}
