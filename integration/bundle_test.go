package integration

import (
	"bytes"
	"strings"
	"testing"

	"github.com/egret-project/egret/internal/tarball"
)

// TestABundleOfANodeIsWhole makes one where kubectl exec would: in the network of a node with a running agent, to the
// standard output.
func TestABundleOfANodeIsWhole(t *testing.T) {
	n := newNamespace(t)
	ip, gateway, pod := n.remote("bundle", "10.10.0.94")
	leavesAs(t, pod, ip)
	out, err := cluster.Exec(t.Context(), "node", gateway, cluster.EgretPath(), "bundle", "-o", "-", "--endpoints", cluster.AgentEndpoints())
	if err != nil && len(out) == 0 {
		t.Fatal(err)
	}
	files := tarball.Files(t, bytes.NewReader(out), "egret-bundle/", nil)
	if strings.Contains(files["manifest.json"], `"error"`) || err != nil {
		t.Errorf("%v; manifest.json:\n%s", err, files["manifest.json"])
	}
	for name, want := range map[string]string{
		"records/owners.jsonl":   ip.String(),
		"node/nftables.txt":      "\t\t" + ip.String(), // among the permits
		"node/nft.txt":           ip.String(),
		"node/routing.txt":       "ip link egret.vx",
		"node/rules.txt":         "protocol 94",
		"node/agent-metrics.txt": "egret_build_info",
		"node/agent-readyz.txt":  "ok",
	} {
		if !strings.Contains(files[name], want) {
			t.Errorf("%s: %q is not in\n%.3000s", name, want, files[name])
		}
	}
	// The rules are those of this version: their words are known, whatever the agent's settings.
	if text := files["node/nftables.txt"]; strings.Contains(text, "is not Egret's") || strings.Count(text, "made with other settings") > 0 {
		t.Errorf("rules that nobody knows:\n%s", text)
	}
}
