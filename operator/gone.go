package operator

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/egret-project/egret/check"
	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/plan"
	"github.com/egret-project/egret/store"
)

// CheckAgents reports whether the agents that are alive are those of nodes of the cluster. client and err are as for
// CheckEtcd.
func CheckAgents(ctx context.Context, client *store.Client, err error) check.Finding {
	f := check.Finding{Check: "agents", Level: check.OK, For: "egress IPs, which agents of nodes alone hold"}
	if client == nil && err == nil {
		f.Found = "not asked: --endpoints says where etcd is"
		return f
	}
	var all store.Everything
	if err == nil {
		all, err = client.ReadAll(ctx)
	}
	if err != nil {
		f.Level, f.Found, f.Consequence = check.Warning, fmt.Sprintf("unknown: %v", err), "it is not known which agents are alive"
		return f
	}
	return agents(f, all.Snapshot)
}

func agents(f check.Finding, s egress.Snapshot) check.Finding {
	var gone []string
	for name := range s.Agents {
		if plan.Gone(&s, name) {
			gone = append(gone, name)
		}
	}
	f.Found = fmt.Sprintf("%d alive, of %d nodes", len(s.Agents)-len(gone), len(s.Nodes))
	if len(gone) > 0 {
		slices.Sort(gone)
		f.Level, f.Found = check.Warning, fmt.Sprintf("%s; without a record of the node: %s", f.Found, strings.Join(gone, ", "))
		f.Consequence = "they serve no egress IP, and nobody lets their pods out: the Node object was deleted, or crdsync has not written the record"
	}
	return f
}
