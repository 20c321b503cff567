package operator

import (
	"context"
	"fmt"
	"slices"

	"github.com/egret-project/egret/check"
	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/plan"
	"github.com/egret-project/egret/store"
)

// CheckPods reports how the agents know which addresses are pods'. A nil client has not reached etcd, and err is why; a
// nil err as well: it was not to be asked.
func CheckPods(ctx context.Context, client *store.Client, err error) check.Finding {
	f := check.Finding{Check: "pod-ranges", Level: check.OK, For: "telling traffic between pods from traffic to the outside"}
	if client == nil && err == nil {
		f.Found = "not asked: --endpoints says where etcd is"
		return f
	}
	var all store.Everything
	if err == nil {
		all, err = client.ReadAll(ctx)
	}
	if err != nil {
		f.Level, f.Found, f.Consequence = check.Warning, fmt.Sprintf("unknown: %v", err), "it is not known whether pods can be told from the outside"
		return f
	}
	return podRanges(f, all.Snapshot)
}

func podRanges(f check.Finding, s egress.Snapshot) check.Finding {
	var without []string
	ranges := 0
	for name, n := range s.Nodes {
		if len(n.PodCIDRs) == 0 {
			without = append(without, name)
		}
		ranges += len(s.Pods[name].CIDRs)
	}
	slices.Sort(without)
	unknown := plan.Unknown(&s, nil)
	switch named := s.Pods[egress.AllNodes].CIDRs; {
	case len(named) > 0:
		f.Found = fmt.Sprintf("%v by --cluster-cidrs, podCIDRs of %d of %d nodes, %d ranges of other pods", named, len(s.Nodes)-len(without), len(s.Nodes), ranges)
	case len(unknown) > 0:
		f.Level, f.Found = check.Warning, fmt.Sprintf("none of %d nodes such as %s: no spec.podCIDRs, and no record of crdsync", len(unknown), unknown[0])
		f.Consequence = "no further pod gets its egress IP, unless the agents have --cluster-cidrs: set it on crdsync, or upgrade crdsync"
	case len(without) > 0 || ranges > 0:
		f.Level = check.Warning
		f.Found = fmt.Sprintf("%d of %d nodes without spec.podCIDRs; crdsync has written down %d ranges of pods", len(without), len(s.Nodes), ranges)
		f.Consequence = "a new pod is neither known as a destination nor held as a source before crdsync has seen it: name the pods' ranges, --cluster-cidrs of crdsync"
	default:
		f.Found = fmt.Sprintf("podCIDRs of %d nodes", len(s.Nodes))
	}
	return f
}
