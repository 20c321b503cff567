package integration

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/egret-project/egret/integration/lab"
)

// exits waits until an egret command ends with a status, and says something.
func exits(t *testing.T, status int, says string, args ...string) {
	t.Helper()
	eventually(t, 15*time.Second, func() error {
		out, err := cluster.Egret(t.Context(), args...)
		got := 0
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			got = exit.ExitCode()
		} else if err != nil {
			return err
		}
		if got != status && (status != wrong || got != 2 && got != 3) || !strings.Contains(string(out), says) {
			return fmt.Errorf("egret %s: status %d, want %d and %q in:\n%s", strings.Join(args, " "), got, status, says, out)
		}
		return nil
	})
}

// wrong stands for the exit statuses of `egret status` when something is wrong: what other tests leave behind may be
// worse.
const wrong = -1

// statusLeavesOut waits until `egret status` says nothing of something.
func statusLeavesOut(t *testing.T, what string) {
	t.Helper()
	eventually(t, 15*time.Second, func() error {
		out, err := cluster.Egret(t.Context(), "status")
		if len(out) == 0 || strings.Contains(string(out), what) {
			return fmt.Errorf("egret status: want nothing of %s:\n%s\n%v", what, out, err)
		}
		return nil
	})
}

// Each thing that egret trace says is held against packets.
func TestTraceSaysWhatBecomesOfPackets(t *testing.T) {
	n := newNamespace(t)
	ip, gateway, pod := n.remote("trace", "10.10.0.51")
	home := otherNode(gateway)
	statusLeavesOut(t, "egress trace")
	exits(t, 0, fmt.Sprintf("gets through, as %s by gateway %s.", ip, gateway), "trace", pod)
	exits(t, 0, "gets through", "trace", pod, "--to", lab.OutsideIP.String())
	leavesAs(t, pod, ip)

	other := n.pod("other", home, "db") // which the sniffers do not know as one of the egress
	exits(t, 0, "no egress selects it", "trace", other)
	leavesAs(t, other, nodeIP(t, home))
	kubectl(t, "label", "--overwrite", "-n", n.name, "pod/other", "app=web")
	exits(t, 0, fmt.Sprintf("gets through, as %s by gateway %s.", ip, gateway), "trace", other)
	leavesAs(t, other, ip)

	n.egress("younger", "trace", "web")
	exits(t, 0, "selected by egress trace; selected by younger too: the oldest applies", "trace", pod)
	leavesAs(t, pod, ip)
	kubectl(t, "delete", "egress", "younger")

	egret(t, "move", ip.String(), "--to", home)
	exits(t, 0, fmt.Sprintf("gets through, as %s by its own node %s.", ip, home), "trace", pod)
	leavesAs(t, pod, ip)

	if err := cluster.Stop(t.Context(), "agent", home); err != nil {
		t.Fatal(err)
	}
	exits(t, 3, "was told to stop", "trace", pod)
	exits(t, wrong, "node "+home+": its agent was told to stop", "status")
	leavesAs(t, pod, ip) // the kernel serves on
	if err := cluster.Start(t.Context(), "agent", home); err != nil {
		t.Fatal(err)
	}
	exits(t, 0, "gets through", "trace", pod)

	kubectl(t, "patch", "externalippool", "trace", "--type", "merge", "-p", `{"spec":{"nodeSelector":{"matchLabels":{"no":"node"}}}}`)
	exits(t, 2, "pool trace selects no node", "trace", pod)
	exits(t, 2, "egress trace: no node holds "+ip.String(), "status")
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	if seen, err := cluster.Source(ctx, pod); err == nil {
		t.Errorf("the pod was seen outside as %s", seen)
	}
	exits(t, 0, "Wrong:", "describe", "egress", "trace")
	kubectl(t, "patch", "externalippool", "trace", "--type", "json", "-p", `[{"op":"replace","path":"/spec/nodeSelector","value":{}}]`)
	exits(t, 0, "gets through", "trace", pod)
	statusLeavesOut(t, "egress trace")
	leavesAs(t, pod, ip)
	for kind, says := range map[string]string{"agents": "agents/" + home, "members": "members/trace/" + home, "blocks": "blocks/" + ip.String() + "/"} {
		exits(t, 0, says, "get", kind, "-o", "name")
	}
}

// What a trace says of a protocol and a port is held against packets, too.
func TestTraceSaysWhatBecomesOfProtocolsAndPorts(t *testing.T) {
	n := newNamespace(t)
	ip, gateway, pod := n.remote("protocols", "10.10.0.56")
	home := otherNode(gateway)
	statusLeavesOut(t, "egress protocols")
	outside := lab.OutsideIP.String()
	exits(t, 0, outside+" port 9 (tcp) is outside", "trace", pod, "--to", outside, "--port", "9")
	exits(t, 0, "gre has no ports", "trace", pod, "--to", outside, "--proto", "gre")

	// A service of the gateway, at all of its addresses.
	var service net.Listener
	if err := cluster.In("node", gateway, func() (err error) {
		service, err = net.Listen("tcp4", "0.0.0.0:0")
		return err
	}); err != nil {
		t.Fatal(err)
	}
	defer service.Close()
	port := service.Addr().(*net.TCPAddr).Port
	connects := func(to netip.Addr, limit time.Duration) error {
		return cluster.In("pod", pod, func() error { // here: another goroutine would dial elsewhere
			c, err := net.DialTimeout("tcp4", netip.AddrPortFrom(to, uint16(port)).String(), limit)
			if err == nil {
				err = c.Close()
			}
			return err
		})
	}
	exits(t, 0, "to which no egress applies", "trace", pod, "--to", nodeIP(t, gateway).String(), "--port", fmt.Sprint(port))
	if err := connects(nodeIP(t, gateway), 10*time.Second); err != nil {
		t.Errorf("the service at the node's own address: %v", err)
	}
	exits(t, 2, "is an egress IP, of protocols: nodes drop what is sent there", "trace", pod, "--to", ip.String(), "--port", fmt.Sprint(port))
	if err := connects(ip, time.Second); err == nil {
		t.Error("a service of the gateway answers at the egress IP")
	}
	// Its own gateway has it, and no neighbour answers for it there.
	exits(t, 3, "those of a pod may not get there either", "trace", pod, "--to", ip.String(), "--proto", "icmp")
	if out, err := cluster.Exec(t.Context(), "pod", pod, "ping", "-c1", "-w5", ip.String()); err == nil {
		t.Errorf("the egress IP answers its own pod's ping: the trace is to say so\n%s", out)
	}

	// The overlay's port of a node, at which a pod's datagram is counted as forged.
	at := nodeIP(t, gateway).String()
	exits(t, 2, "UDP port 8479 of "+at, "trace", pod, "--to", at, "--proto", "udp", "--port", "8479")
	before := foreign(t, home)
	eventually(t, 10*time.Second, func() error {
		if err := cluster.In("pod", pod, func() error {
			c, err := net.Dial("udp4", at+":8479")
			if err == nil {
				_, err = c.Write([]byte("x"))
				err = errors.Join(err, c.Close())
			}
			return err
		}); err != nil {
			return err
		}
		if foreign(t, home) == before {
			return errors.New("a pod's datagram for the overlay's port of a node was not dropped")
		}
		return nil
	})
}
