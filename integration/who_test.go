package integration

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/egret-project/egret/integration/lab"
)

// TestWhoNamesThePodWhosePortTheOutsideSaw asks for the port that a host outside saw a connection come from: while it
// is open, and when pod and connection are gone.
func TestWhoNamesThePodWhosePortTheOutsideSaw(t *testing.T) {
	n := newNamespace(t)
	ip, gateway, pod := n.remote("who", "10.10.0.95")
	home := otherNode(gateway)
	// The agent of the pod's node, with a log.
	script, log := filepath.Join(t.TempDir(), "egret"), filepath.Join(t.TempDir(), "nat.log")
	if err := os.WriteFile(script, fmt.Appendf(nil, "#!/bin/sh\nexec %s \"$@\" --nat-log %s\n", cluster.EgretPath(), log), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := cluster.Upgrade(t.Context(), home, script); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := cluster.Upgrade(t.Context(), home, cluster.EgretPath()); err != nil {
			t.Error(err)
		}
	}()
	eventually(t, 15*time.Second, func() error {
		b, err := os.ReadFile(log)
		if err == nil && !strings.Contains(string(b), "log_start") {
			err = fmt.Errorf("the log has not begun: %q", b)
		}
		return err
	})
	const port = 7955
	var l net.Listener
	to := net.JoinHostPort(lab.OutsideIP.String(), fmt.Sprint(port))
	if err := cluster.In("outside", "", func() (err error) { l, err = net.Listen("tcp", to); return err }); err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	var c net.Conn
	if err := cluster.In("pod", pod, func() (err error) {
		c, err = (&net.Dialer{Timeout: 8 * time.Second, LocalAddr: &net.TCPAddr{Port: 10955}}).Dial("tcp", to)
		return err
	}); err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	outside, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer outside.Close()
	seen := netip.MustParseAddrPort(outside.RemoteAddr().String())
	if seen.Addr() != ip {
		t.Fatalf("the outside sees %s, want %s", seen, ip)
	}
	at := time.Now()
	who := func(want string, args ...string) {
		t.Helper()
		eventually(t, 10*time.Second, func() error {
			out, err := cluster.Exec(t.Context(), "node", home, append([]string{cluster.EgretPath(), "who", "--endpoints", cluster.AgentEndpoints(), seen.String()}, args...)...)
			if err != nil || !strings.Contains(string(out), want) || !strings.Contains(string(out), "node "+home+", ports") {
				return fmt.Errorf("%v: %w: want %q in\n%s", args, err, want, out)
			}
			t.Logf("egret who %s %s\n%s", seen, strings.Join(args, " "), out)
			return nil
		})
	}
	who(pod)
	exits(t, 1, "spec.nodeName="+home, "who", seen.String()) // from elsewhere
	time.Sleep(1500 * time.Millisecond)                      // so that the moment is past
	n.remove(pod)
	who(pod, "--at", at.UTC().Format(time.RFC3339Nano))
}
