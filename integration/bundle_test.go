package integration

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"errors"
	"io"
	"strings"
	"testing"
)

// TestABundleOfANodeIsWhole makes one where kubectl exec would: in the network of a node with a running agent, to the standard output.
func TestABundleOfANodeIsWhole(t *testing.T) {
	n := newNamespace(t)
	ip, gateway, pod := n.remote("bundle", "10.10.0.52")
	leavesAs(t, pod, ip)
	out, err := cluster.Exec(t.Context(), "node", gateway, cluster.EgretPath(), "bundle", "-o", "-", "--endpoints", cluster.AgentEndpoints())
	if err != nil && len(out) == 0 {
		t.Fatal(err)
	}
	plain, zerr := gzip.NewReader(bytes.NewReader(out))
	if zerr != nil {
		t.Fatal(zerr)
	}
	files := map[string]string{}
	for r := tar.NewReader(plain); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		files[strings.TrimPrefix(h.Name, "egret-bundle/")] = string(b)
	}
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
