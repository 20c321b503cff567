package lab

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"
)

// The CNIs of a lab with kubelets. flannel is as its users have it: its own manifest, applied by kubectl, runs flanneld
// on each node, which makes VXLAN links to the other nodes and masquerades what leaves the pods' network. Three things
// are the lab's: the images, of what integration/kube/flannel/build made and the machine's iptables; the folders for
// CNI, which are in each node's /run; and IPv6 beside IPv4.
const (
	// CNIBridge is the default: the reference plugins bridge and host-local, with routes and a table that masquerades,
	// which the lab makes.
	CNIBridge = "bridge"
	// CNIFlannel is flannel as its manifest has it, with iptables: those that write to nftables.
	CNIFlannel = "flannel"
	// CNIFlannelNFTables has EnableNFTables, with which flanneld writes tables of its own.
	CNIFlannelNFTables = "flannel-nftables"
)

// CNIs are the values of Config.CNI.
func CNIs() []string { return []string{CNIBridge, CNIFlannel, CNIFlannelNFTables} }

func (c Config) flannel() bool { return c.CNI == CNIFlannel || c.CNI == CNIFlannelNFTables }

// The folders for CNI of a node with flannel, whose manifest has /opt/cni/bin and /etc/cni/net.d: the node shares those
// with the machine.
const (
	flannelBin  = "/run/cni/bin"
	flannelConf = "/run/cni/net.d"
)

// flannelTimeout is for flannel's pods to start on each node, and for their nodes to become ready by that.
const flannelTimeout = 3 * time.Minute

// flannelFiles are what integration/kube/flannel/build makes, in the folder flannel of KubeBin.
func flannelFiles() []string {
	return []string{"flanneld", "install-conf", "flannel", "portmap", flannelManifest}
}

const flannelManifest = "kube-flannel.yml"

func (l *Lab) flannelFile(name string) string { return filepath.Join(l.cfg.KubeBin, "flannel", name) }

// cniFolders returns where containerd of a node looks for plugins and for their configuration.
func (l *Lab) cniFolders(node string) (bin, conf string) {
	if l.cfg.flannel() {
		return flannelBin, flannelConf
	}
	return filepath.Join(l.cfg.KubeBin, "cni"), l.path(node, "cni")
}

// makeFlannelFolders makes the folders for CNI of the node whose file system the caller has, with the plugins that a
// distribution has; flannel's pod adds its own plugin, and the configuration.
func (l *Lab) makeFlannelFolders() error {
	if err := errors.Join(os.MkdirAll(flannelBin, 0o755), os.MkdirAll(flannelConf, 0o755)); err != nil {
		return err
	}
	plugins, err := filepath.Glob(filepath.Join(l.cfg.KubeBin, "cni", "*"))
	if err != nil {
		return err
	}
	for _, plugin := range append(plugins, l.flannelFile("portmap")) {
		if err := os.Symlink(plugin, filepath.Join(flannelBin, filepath.Base(plugin))); err != nil && !errors.Is(err, os.ErrExist) {
			return err
		}
	}
	return nil
}

// startFlannel gives each node flannel's images, and applies its manifest.
func (l *Lab) startFlannel(ctx context.Context) error {
	b, err := os.ReadFile(l.flannelFile(flannelManifest))
	if err != nil {
		return err
	}
	manifest, err := l.flannelObjects(string(b))
	if err != nil {
		return fmt.Errorf("changing %s for the lab: %w", l.flannelFile(flannelManifest), err)
	}
	archive, file := l.path("flannel.tar"), l.path(flannelManifest)
	if err := os.WriteFile(file, []byte(manifest), 0o600); err != nil {
		return err
	}
	i, err := l.flannelImage(ctx, imageNames(manifest))
	if err != nil {
		return fmt.Errorf("making flannel's image: %w", err)
	}
	if err := i.write(archive); err != nil {
		return err
	}
	if err := l.loadImage(ctx, archive); err != nil {
		return err
	}
	_, err = l.Kubectl(ctx, "apply", "-f", file)
	return err
}

// flannelObjects returns flannel's manifest with what is the lab's in it.
func (l *Lab) flannelObjects(manifest string) (string, error) {
	network := fmt.Sprintf(`"Network": %q,`, families()[0].cluster)
	changes := [][2]string{
		{"path: /opt/cni/bin\n", "path: " + flannelBin + "\n"},
		{"path: /etc/cni/net.d\n", "path: " + flannelConf + "\n"},
		{network, network},
	}
	if fs := families(); len(fs) > 1 {
		changes[2][1] = fmt.Sprintf(`%s "EnableIPv6": true, "IPv6Network": %q,`, network, fs[1].cluster)
	}
	if l.cfg.CNI == CNIFlannelNFTables {
		changes = append(changes, [2]string{`"EnableNFTables": false`, `"EnableNFTables": true`})
	}
	for _, c := range changes {
		if n := strings.Count(manifest, c[0]); n != 1 {
			return "", fmt.Errorf("it has %q %d times, want once: this version of flannel needs another lab", c[0], n)
		}
		manifest = strings.Replace(manifest, c[0], c[1], 1)
	}
	return manifest, nil
}

var imageLine = regexp.MustCompile(`(?m)^ *image: (\S+)$`)

// imageNames returns those that a manifest runs, each once.
func imageNames(manifest string) []string {
	names := map[string]bool{}
	for _, m := range imageLine.FindAllStringSubmatch(manifest, -1) {
		names[m[1]] = true
	}
	return slices.Sorted(maps.Keys(names))
}

// flannelImage returns one image that has what both of flannel's have: flanneld with the programs that it runs, and the
// plugin.
func (l *Lab) flannelImage(ctx context.Context, names []string) (image, error) {
	busybox, err := findBusybox()
	if err != nil {
		return image{}, err
	}
	i := image{
		names: names, entrypoint: []string{"/opt/bin/flanneld"}, path: "/usr/sbin:/bin",
		files: map[string]string{
			"opt/bin/flanneld": l.flannelFile("flanneld"), "opt/bin/install-conf": l.flannelFile("install-conf"),
			"flannel": l.flannelFile("flannel"), "bin/busybox": busybox,
		},
		links: map[string]string{"bin/cp": "busybox"},
	}
	for _, name := range []string{"iptables-nft", "nft"} {
		program, err := exec.LookPath(name)
		if err == nil {
			program, err = filepath.EvalSymlinks(program)
		}
		if err == nil {
			err = i.addProgram(ctx, program)
		}
		if err != nil {
			return image{}, fmt.Errorf("%w: install iptables and nftables", err)
		}
		if name != "nft" {
			for _, link := range []string{"iptables", "iptables-restore", "ip6tables", "ip6tables-restore"} {
				i.links["usr/sbin/"+link] = filepath.Base(program)
			}
		}
	}
	extensions, err := filepath.Glob("/usr/lib/*/xtables/*.so") // which iptables loads by their names
	for _, so := range extensions {
		i.files[strings.TrimPrefix(so, "/")] = so
	}
	return i, err
}

// addProgram adds a program of the machine to /usr/sbin of an image, and the libraries that it is linked with
// (ld.so(8)).
func (i image) addProgram(ctx context.Context, program string) error {
	i.files[path.Join("usr/sbin", filepath.Base(program))] = program
	cmd := exec.CommandContext(ctx, program)
	cmd.Env = []string{"LD_TRACE_LOADED_OBJECTS=1"}
	out, err := cmd.Output()
	if err != nil {
		return fmt.Errorf("listing the libraries of %s: %w", program, err)
	}
	for _, word := range strings.Fields(string(out)) {
		if strings.HasPrefix(word, "/") {
			i.files[strings.TrimPrefix(word, "/")] = word
		}
	}
	return nil
}

// waitFlannel returns when each node has flannel's routes to the pods of all others.
func (l *Lab) waitFlannel(ctx context.Context) error {
	var procs []string
	for _, n := range l.nodes() {
		procs = append(procs, kubeletProc(NodeName(n)))
	}
	return l.wait(ctx, "flannel's routes", flannelTimeout, procs, func(context.Context) error {
		for _, n := range l.nodes() {
			if err := l.at(NodeName(n), func(h *host) error { return l.hasFlannelRoutes(h, n) }); err != nil {
				return err
			}
		}
		return nil
	})
}

func (l *Lab) hasFlannelRoutes(h *host, n int) error {
	for _, f := range families() {
		for _, peer := range l.nodes() {
			if peer == n {
				continue
			}
			to := f.podIP(peer, 2)
			routes, err := h.nl.RouteGet(to.AsSlice())
			if err != nil || len(routes) == 0 {
				return fmt.Errorf("looking for the way from %s to %v: %w", h.name, to, err)
			}
			link, err := h.nl.LinkByIndex(routes[0].LinkIndex)
			if err != nil {
				return err
			}
			if name := link.Attrs().Name; !strings.HasPrefix(name, "flannel") {
				return fmt.Errorf("the way from %s to %v is by %s, not yet by a link of flannel", h.name, to, name)
			}
		}
	}
	return nil
}
