package integration

import (
	"context"
	"errors"
	"fmt"
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

// wrong stands for the exit statuses of `egret status` when something is wrong: what other tests leave behind may be worse.
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
