// Package imports checks who imports whom: the rules of docs/design.md, "Layout".
package imports

import (
	"encoding/json"
	"errors"
	"io"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/egret-project/egret/"

// packages returns the direct imports of every package of the module, tests left out.
func packages(t *testing.T) map[string][]string {
	t.Helper()
	out, err := exec.Command("go", "list", "-json=ImportPath,Imports", module+"...").Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	all := map[string][]string{}
	for d := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p struct {
			ImportPath string
			Imports    []string
		}
		if err := d.Decode(&p); errors.Is(err, io.EOF) {
			return all
		} else if err != nil {
			t.Fatalf("go list: %v", err)
		}
		all[strings.TrimPrefix(p.ImportPath, module)] = p.Imports
	}
}

func TestImportRules(t *testing.T) {
	kernel := []string{"nft", "routing", "vlan", "announce", "conntrack", "check", "fastpath", "inject"}
	all := packages(t)
	for _, name := range append([]string{"egress", "plan", "ownership", "store", "agent", "crdsync", "crdsync/spec", "operator", "page", "gossip", "monitor", "connlimit", "cloud"}, kernel...) {
		if _, ok := all[name]; !ok {
			t.Errorf("package %s is not there: the rules below check nothing", name)
		}
	}
	for name, imports := range all {
		for _, path := range imports {
			own := strings.TrimPrefix(path, module)
			ours := own != path
			switch {
			case (name == "egress" || name == "connlimit") && (ours || strings.Contains(path, ".")):
				t.Errorf("%s is a leaf of the standard library: it must not import %s", name, path)
			case name == "crdsync/spec" && (strings.HasPrefix(path, "k8s.io/client-go") || path == "context"):
				t.Errorf("crdsync/spec is pure: it must not import %s", path)
			case (name == "plan" || name == "ownership") && slices.Contains([]string{"os", "net", "log", "log/slog", "context"}, path):
				t.Errorf("%s is pure: it must not import %s", name, path)
			case slices.Contains(kernel, name) && ours && own != "egress":
				t.Errorf("kernel package %s must import nothing of ours but egress, not %s", name, own)
			case name == "monitor" && ours && own != "connlimit":
				t.Errorf("monitor knows nothing of what it tells: it must not import %s", path)
			case name == "page" && ours && !slices.Contains([]string{"operator", "store", "egress", "monitor", "connlimit"}, own):
				t.Errorf("page shows what operator says, and decides nothing: it must not import %s", path)
			case name == "cloud" && (strings.Contains(path, "aws") || strings.HasPrefix(path, "k8s.io/")):
				t.Errorf("cloud knows no cloud by name, and neither Kubernetes nor a kernel: it must not import %s", path)
			case strings.HasPrefix(path, "github.com/aws/aws-sdk-go-v2/service/"):
				t.Errorf("%s must not import %s: see the doc of cloud/aws", name, path)
			case name == "gossip" && (ours && own != "connlimit" || strings.Contains(path, "netlink") || strings.HasPrefix(path, "go.etcd.io/")):
				t.Errorf("gossip knows neither kernel nor etcd: it must not import %s", path)
			case ours && strings.HasPrefix(own, "integration") && !strings.HasPrefix(name, "integration") && name != "cmd/egret-lab":
				t.Errorf("%s must not import %s: only cmd/egret-lab may", name, own)
			case ours && strings.HasPrefix(own, "internal/"):
				if !strings.HasPrefix(name, "internal/") && !strings.HasPrefix(name, "integration") {
					t.Errorf("%s must not import the test helper %s", name, own)
				}
			case path == "k8s.io/client-go/util/jsonpath": // templates, and no client
			case strings.HasPrefix(path, "k8s.io/client-go"):
				if !slices.ContainsFunc([]string{"crdsync", "cmd/", "integration", "internal/kubetest"}, func(p string) bool { return strings.HasPrefix(name, p) }) {
					t.Errorf("%s must not import %s: crdsync is the only part that speaks to the Kubernetes API", name, path)
				}
			}
		}
	}
}
