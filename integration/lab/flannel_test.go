package lab

import (
	"slices"
	"strings"
	"testing"
)

// What flannelObjects knows of flannel's manifest.
const flannelLines = `
      "Network": "10.244.0.0/16",
      "EnableNFTables": false,
        - mountPath: /opt/cni/bin
          path: /opt/cni/bin
          path: /etc/cni/net.d
        image: example.test/plugin:1
        image: example.test/flannel:2
        image: example.test/flannel:2
`

func TestTheManifestOfFlannelGetsTheFoldersOfANodeOfTheLab(t *testing.T) {
	for cni, nftables := range map[string]string{CNIFlannel: "false", CNIFlannelNFTables: "true"} {
		got, err := (&Lab{cfg: Config{CNI: cni}}).flannelObjects(flannelLines)
		if err != nil {
			t.Fatal(err)
		}
		for _, want := range []string{" path: " + flannelBin + "\n", " path: " + flannelConf + "\n", "mountPath: /opt/cni/bin\n", `"EnableNFTables": ` + nftables + ","} {
			if !strings.Contains(got, want) {
				t.Errorf("%s: the manifest has no %q:\n%s", cni, want, got)
			}
		}
		if len(families()) > 1 && !strings.Contains(got, `"EnableIPv6": true, "IPv6Network": "fd44::/16",`) {
			t.Errorf("%s: the manifest has no IPv6:\n%s", cni, got)
		}
	}
}

func TestAManifestOfFlannelThatIsNotAsTheLabKnowsItIsRefused(t *testing.T) {
	for name, manifest := range map[string]string{
		"without a folder":    strings.Replace(flannelLines, "path: /etc/cni/net.d", "path: /etc/cni/conf.d", 1),
		"with another subnet": strings.Replace(flannelLines, "10.244", "10.245", 1),
		"with two networks":   flannelLines + flannelLines,
	} {
		if _, err := (&Lab{cfg: Config{CNI: CNIFlannel}}).flannelObjects(manifest); err == nil || !strings.Contains(err.Error(), "want once") {
			t.Errorf("%s: got error %v, want one that says what is not there once", name, err)
		}
	}
}

func TestEachImageOfAManifestIsNamedOnce(t *testing.T) {
	want := []string{"example.test/flannel:2", "example.test/plugin:1"}
	if got := imageNames(flannelLines); !slices.Equal(got, want) {
		t.Errorf("images: got %q, want %q", got, want)
	}
}

func TestACNIThatALabCannotHaveIsRefused(t *testing.T) {
	for _, c := range []Config{{CNI: "weave", Kubelet: true}, {CNI: CNIFlannel}} {
		if err := c.Validate(); err == nil || !strings.Contains(err.Error(), c.CNI) {
			t.Errorf("CNI %q, kubelets %v: got error %v, want one that names the CNI", c.CNI, c.Kubelet, err)
		}
	}
	for _, c := range []Config{{}, {Kubelet: true}, {CNI: CNIBridge}, {CNI: CNIFlannelNFTables, Kubelet: true}} {
		if err := c.Validate(); err != nil {
			t.Errorf("CNI %q, kubelets %v: got error %v, want none", c.CNI, c.Kubelet, err)
		}
	}
}
