package manifests_test

import (
	"os/exec"
	"testing"

	"github.com/egret-project/egret/internal/kubetest"
)

// The oldest API that the API server of the tests emulates takes what README.md has applied, with the rules of the CRDs
// and of the policies.
func TestAnOlderAPITakesTheManifests(t *testing.T) {
	t.Parallel()
	const oldest = "kube=1.33"
	file := kubeconfig(t, kubetest.New(t, "--emulated-version="+oldest, "--min-compatibility-version="+oldest))
	for _, folders := range [][]string{{"crds", "deploy"}, {"examples", "examples/tenancy"}} {
		args := []string{"--kubeconfig", file, "--cache-dir", t.TempDir(), "apply"}
		for _, f := range folders {
			args = append(args, "-f", f)
		}
		if out, err := exec.CommandContext(t.Context(), kubetest.Kubectl(t), args...).CombinedOutput(); err != nil {
			t.Errorf("kubectl %v: %v\n%s", args, err, out)
		}
	}
}
