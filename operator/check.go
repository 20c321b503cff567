package operator

import (
	"context"
	"fmt"
	"io"
	"net/netip"
	"strings"

	"github.com/egret-project/egret/check"
	"github.com/egret-project/egret/store"
)

// CheckNode writes what there is to say of this node (see check.Run), and more that was found, in a format (see
// CheckFormat). An error says that the agent cannot work here.
func CheckNode(nodeIP netip.Addr, more []check.Finding, format string, w io.Writer) error {
	findings, err := check.Run(nodeIP)
	if err != nil {
		return err
	}
	findings = append(findings, more...)
	l := listing{kind: "check", header: "CHECK LEVEL FOUND FOR CONSEQUENCE"}
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

// CheckEtcd reports the state of etcd. A nil client: etcd was not reached, and err is why; a nil err as well: it was
// not to be asked.
func CheckEtcd(ctx context.Context, client *store.Client, err error) check.Finding {
	f := check.Finding{Check: "etcd", Level: check.OK, For: "locks, and all that agents know"}
	if client == nil && err == nil {
		f.Found = "not asked: --endpoints says where it is"
		return f
	}
	var space store.Space
	if err == nil {
		space, err = client.Space(ctx)
	}
	if err != nil {
		f.Level, f.Found, f.Consequence = check.Missing, fmt.Sprintf("no: %v", err), "an agent waits for it when it starts"
		return f
	}
	var members []string
	crowded := false
	for _, m := range space.Members {
		members = append(members, m.String())
		crowded = crowded || m.Quota != 0 && m.Size > m.Quota/10*9
	}
	f.Found = strings.Join(members, "; ")
	switch {
	case space.NoSpace:
		f.Level, f.Found = check.Warning, "NOSPACE: "+f.Found
		f.Consequence = "it takes no changes: no egress IP gets another node, no new pod is known, until there is room and the alarm is disarmed"
	case space.Fault != nil:
		f.Level, f.Found = check.Warning, space.Fault.Error()
		f.Consequence = "without most of its members etcd answers nobody"
	case crowded:
		f.Level, f.Consequence = check.Warning, "it is nearly full; then it takes no changes: raise --quota-backend-bytes, or delete what others keep there"
	}
	return f
}
