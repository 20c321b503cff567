package integration

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os/exec"
	"testing"

	"github.com/egret-project/egret/integration/witness"
)

// selected waits until the pod leaves as each of ips, one of a family at most. From then on, until the end of the run,
// none of its packets of these families may leave otherwise.
func selected(t *testing.T, pod string, ips ...netip.Addr) {
	t.Helper()
	for _, ip := range ips {
		leavesAs(t, pod, ip)
	}
	if err := watch.Select(t.Context(), pod, ips...); err != nil {
		t.Fatal(err)
	}
	for _, ip := range ips {
		leavesAs(t, pod, ip)
	}
}

// outsideOf returns the address of the outside host in the family of ip.
func outsideOf(ip netip.Addr) netip.Addr { return witness.OutsideOf(ip) }

// askWhoHas asks for ip from the outside host, by broadcast or multicast, again and again until the function that it
// returns is called.
func askWhoHas(t *testing.T, ip netip.Addr) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	ask := []string{"arping", "-q", "-b", "-f", "-w", "1", "-I", "eth0", ip.String()}
	if ip.Is6() {
		// What is not known is asked for.
		ask = []string{"sh", "-c", fmt.Sprintf("ip -6 neigh flush to %s dev eth0; ping -6 -q -c1 -W1 %[1]s", ip)}
	}
	go func() {
		defer close(done)
		for ctx.Err() == nil {
			_, err := cluster.Exec(ctx, "outside", "", ask...)
			// Without an answer it ends after a second with an error; that silence is what the test is about, but not
			// of a program that is missing.
			if exit := (*exec.ExitError)(nil); ctx.Err() == nil && err != nil && (!errors.As(err, &exit) || exit.ExitCode() == 127) {
				t.Errorf("asking who has %s: %v", ip, err)
				return
			}
		}
	}()
	return func() { cancel(); <-done }
}
