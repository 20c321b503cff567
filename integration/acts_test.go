package integration

import (
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"
)

// What people do with commands is reported with their names: in the history of the IP, in the list of acts, and as
// Events, once, also after another leader took over.
func TestWhoMovedPinnedAndCordonedIsRecorded(t *testing.T) {
	n := newNamespace(t)
	ip, gateway, _ := n.remote("acts", "10.10.0.52")
	to := otherNode(gateway)
	host, err := os.Hostname()
	if err != nil {
		t.Fatal(err)
	}
	ownershipLogged(t, ip, []string{fmt.Sprintf(`msg="egress IP claimed" egress_ip=%s egress=[acts] why=`, ip)})
	egret(t, "move", ip.String(), "--to", to, "--pin")
	ownershipLogged(t, ip, []string{
		fmt.Sprintf(`msg="egress IP claimed" egress_ip=%s egress=[acts] why=`, ip), fmt.Sprintf(`egress_ip=%s node=%s why=move`, ip, to),
	})
	egret(t, "unpin", ip.String())
	egret(t, "cordon", gateway)
	egret(t, "uncordon", gateway)
	history := egret(t, "history", ip.String())
	for _, want := range []string{"move", "pin", "unpin"} {
		found := false
		for line := range strings.Lines(history) {
			f := strings.Fields(line)
			found = found || len(f) == 6 && f[3] == want && strings.HasSuffix(f[5], "@"+host)
		}
		if !found {
			t.Errorf("the history does not say who did %s:\n%s", want, history)
		}
	}
	acts := egret(t, "get", "acts", "-o", `jsonpath={range .items[*]}{.what} {.ip}{.node}{"\n"}{end}`)
	for _, want := range []string{"move " + ip.String() + to, "pin " + ip.String() + to, "unpin " + ip.String(), "cordon " + gateway, "uncordon " + gateway} {
		if !strings.Contains(acts, want+"\n") {
			t.Errorf("%q is none of the acts:\n%s", want, acts)
		}
	}
	reported := func() error {
		events := kubectl(t, "get", "events", "-n", "default", "-o", `jsonpath={range .items[*]}{.reason} {.involvedObject.kind} {.involvedObject.name} {.message}{"\n"}{end}`)
		for _, want := range []string{
			fmt.Sprintf("MoveRequested Egress acts %s: a move to node %s was asked for by ", ip, to), fmt.Sprintf("IPPinned Egress acts %s: pinned to node %s by ", ip, to),
			fmt.Sprintf("IPUnpinned Egress acts %s: unpinned by ", ip), fmt.Sprintf("EgretCordoned Node %s node %[1]s takes no egress IPs", gateway), fmt.Sprintf("EgretUncordoned Node %s", gateway),
		} {
			lines := 0
			for line := range strings.Lines(events) {
				if strings.HasPrefix(line, want) && strings.Contains(line, "@"+host) {
					lines++
				}
			}
			// Other tests cordon nodes, too.
			if lines == 0 || lines > 1 && strings.Contains(want, "Egress acts") {
				return fmt.Errorf("%d Events begin with %q:\n%s", lines, want, events)
			}
		}
		return nil
	}
	eventually(t, 15*time.Second, reported)
	if err := cluster.Stop(t.Context(), "crdsync", ""); err != nil {
		t.Fatal(err)
	}
	if err := cluster.Start(t.Context(), "crdsync", ""); err != nil {
		t.Fatal(err)
	}
	egret(t, "move", ip.String(), "--to", gateway)
	eventually(t, 20*time.Second, func() error { // the new leader has made the Event of this one, and so of all before
		if events := kubectl(t, "get", "events", "-n", "default"); !strings.Contains(events, fmt.Sprintf("a move to node %s was asked for", gateway)) {
			return fmt.Errorf("the new leader has made no Event:\n%s", events)
		}
		return nil
	})
	if err := reported(); err != nil {
		t.Error(err)
	}
}

// ownershipLogged waits until the logs of all agents together have a line for each change of an IP's owner, in this
// order, which say what is wanted, and no other ones.
func ownershipLogged(t *testing.T, ip netip.Addr, want []string) {
	t.Helper()
	eventually(t, 15*time.Second, func() error {
		var lines []string
		for _, node := range nodes() {
			for line := range strings.Lines(string(agentLog(t, node))) {
				if strings.Contains(line, `msg="egress IP `) && strings.Contains(line, "egress_ip="+ip.String()+" ") {
					lines = append(lines, line) // each begins with the time
				}
			}
		}
		slices.Sort(lines)
		if !slices.EqualFunc(lines, want, strings.Contains) {
			return fmt.Errorf("the logs have %q, want lines with %q", lines, want)
		}
		return nil
	})
}
