package integration

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"
)

// A host outside the cluster that has an egress IP already keeps it; the nodes say so, and take the IP when it is free.
func TestAnIPThatAnotherHostUsesIsNotClaimed(t *testing.T) {
	for name, address := range map[string]string{"4": "10.10.0.35", "6": "fd10::35"} {
		t.Run(name, func(t *testing.T) {
			n := newNamespace(t)
			ip := netip.MustParseAddr(address)
			bits := 24
			if ip.Is6() {
				bits = 64
			}
			outside := func(line string) {
				t.Helper()
				if out, err := cluster.Exec(context.Background(), "outside", "", strings.Fields(line)...); err != nil {
					t.Fatalf("%s: %v\n%s", line, err, out)
				}
			}
			outside(fmt.Sprintf("ip addr add %s/%d dev eth0", ip, bits))
			gone := false
			leave := func() {
				if !gone {
					outside(fmt.Sprintf("ip addr del %s/%d dev eth0", ip, bits))
				}
				gone = true
			}
			defer leave()
			if ip.Is6() { // while it checks the address itself it does not answer
				eventually(t, 5*time.Second, func() error {
					out, err := cluster.Exec(t.Context(), "outside", "", "ip", "-6", "addr", "show", "dev", "eth0", "to", ip.String())
					if err == nil && (len(out) == 0 || strings.Contains(string(out), "tentative")) {
						err = fmt.Errorf("%s", out)
					}
					return err
				})
			}
			conflict := "used-" + name
			n.pool(conflict, address, address)
			n.egress(conflict, conflict, "web")
			mac, err := cluster.Exec(t.Context(), "outside", "", "cat", "/sys/class/net/eth0/address")
			if err != nil {
				t.Fatal(err)
			}
			want := fmt.Sprintf("False AssignmentError no node holds %s: another host uses it, %s on link eth0 of node node-", ip, strings.TrimSpace(string(mac)))
			eventually(t, 10*time.Second, func() error {
				if got := condition(t, conflict, "IPAssigned"); !strings.HasPrefix(got, want) {
					return fmt.Errorf("condition %q, want %q", got, want)
				}
				return nil
			})
			time.Sleep(3 * time.Second) // for another candidate to do what it must not
			if _, owner := lookUp(t, conflict); owner != "" {
				t.Errorf("%s has it all the same", owner)
			}
			leave()
			eventually(t, 40*time.Second, func() error {
				if got := condition(t, conflict, "IPAssigned"); !strings.HasPrefix(got, "True Assigned") {
					return fmt.Errorf("condition %q", got)
				}
				return nil
			})
			selected(t, n.pod("web", "node-1", "web"), ip)
			if ip.Is6() {
				return
			}
			// Taken over without a question, and announced against whoever comes later.
			_, gateway := held(t, conflict)
			before := time.Now()
			egret(t, "drain", gateway)
			t.Cleanup(func() {
				if out, err := cluster.Egret(context.Background(), "uncordon", gateway); err != nil {
					t.Errorf("%v\n%s", err, out)
				}
			})
			eventually(t, 10*time.Second, func() error {
				if _, owner := lookUp(t, conflict); owner == gateway || owner == "" {
					return fmt.Errorf("owner %q", owner)
				}
				return nil
			})
			for _, a := range watch.LAN().ARPs() {
				if a.Time.After(before) && a.TargetIP == ip && a.SenderIP.IsUnspecified() {
					t.Errorf("it was asked for at a take-over: %s", a)
				}
			}
			time.Sleep(1500 * time.Millisecond) // until the new owner's announcements count as old
			stranger(t, ip, func() {
				eventually(t, 5*time.Second, func() error {
					if got := condition(t, conflict, "Degraded"); !strings.HasPrefix(got, "True AddressInUse") {
						return fmt.Errorf("condition %q", got)
					}
					return nil
				})
			})
		})
	}
}

// stranger has the outside host say, while f runs, that ip is at a MAC address that is nobody's.
func stranger(t *testing.T, ip netip.Addr, f func()) {
	t.Helper()
	mac := net.HardwareAddr{2, 0, 0, 0, 0, 0x99}
	// A link of its own on the outside host's.
	for _, line := range []string{"ip link add stray link eth0 address " + mac.String() + " type macvlan mode bridge", "ip link set stray up", "ip addr add " + ip.String() + "/32 dev stray",
		"arping -q -A -c1 -I stray " + ip.String()} {
		if out, err := cluster.Exec(t.Context(), "outside", "", strings.Fields(line)...); err != nil {
			t.Fatalf("%s: %v\n%s", line, err, out)
		}
	}
	defer func() {
		if out, err := cluster.Exec(context.Background(), "outside", "", "ip", "link", "del", "stray"); err != nil {
			t.Errorf("%v\n%s", err, out)
		}
	}()
	f()
}

// condition returns status, reason and message of an egress's condition.
func condition(t *testing.T, egress, kind string) string {
	t.Helper()
	path := fmt.Sprintf(`jsonpath={range .status.conditions[?(@.type==%q)]}{.status} {.reason} {.message}{end}`, kind)
	return kubectl(t, "get", "egress", egress, "-o", path)
}
