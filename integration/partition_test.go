package integration

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/egret-project/egret/egress"
)

// TestOwnerIsPartitioned partitions the owner of an IP, and leaves it on the LAN, where it could answer: another node
// takes over, and the owner is silent before that one speaks. One that has lost etcd sends its peers word of that,
// while they are reachable: nobody waits for the end of its lease.
func TestOwnerIsPartitioned(t *testing.T) {
	// an agent that has had etcd for less than 3 s, as at its start, promises as if it had none
	time.Sleep(4 * time.Second)
	for _, tt := range []struct{ name, address, from string }{
		{"from etcd", "10.10.0.19", "etcd"},
		{"from what etcd sends", "10.10.0.45", "etcd-in"},
		{"from etcd as its hearer", "10.10.0.46", "etcd-out"},
		{"from its peers", "10.10.0.42", "peers"},
		{"from what its peers send", "10.10.0.47", "peers-in"},
		{"from its peers as their hearers", "10.10.0.49", "peers-out"},
		{"from etcd and its peers", "10.10.0.41", "etcd peers"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			each := func(f func(ctx context.Context, node, what string) error) func(context.Context, string) error {
				return func(ctx context.Context, node string) (err error) {
					for _, what := range strings.Fields(tt.from) {
						err = errors.Join(err, f(ctx, node, what))
					}
					return err
				}
			}
			var silent, claimed time.Duration
			for try := range 3 { // others may use the machine in one
				t.Run(fmt.Sprint("try ", try), func(t *testing.T) {
					ip, gateway, began := takeOver(t, "cut-"+strings.ReplaceAll(tt.from, " ", "-"), tt.address, each(cluster.Cut), each(cluster.Heal))
					silent = watch.LastAnswer(ip, gateway).Sub(began)
					for _, o := range records[egress.Owner](t, "owners") {
						if o.IP == ip {
							claimed = o.Since.Sub(began)
						}
					}
				})
				if t.Failed() || !strings.Contains(tt.from, "etcd") {
					return // who has etcd may speak until the gossip holds it for dead, and its lease has no end
				}
				if silent <= time.Second && claimed <= leaseTTL-500*time.Millisecond {
					return
				}
			}
			t.Errorf("the owner that was cut off answered for %v, and it took %v until the claim: want a second, and less than the lease's %v", silent, claimed, leaseTTL)
		})
	}
}
