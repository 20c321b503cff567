package manifests

import (
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
)

// Members find the file that they begin with where the Job of snapshots writes on its node, also where their own data
// is on volumes.
func TestMembersFindTheSnapshotThatTheyBeginWith(t *testing.T) {
	t.Parallel()
	// of returns where a file of a pod is on its node.
	of := func(pod corev1.PodSpec, file string) string {
		var mount corev1.VolumeMount // of the mounts above it, the lowest
		for _, m := range pod.Containers[0].VolumeMounts {
			if strings.HasPrefix(file, m.MountPath+"/") && len(m.MountPath) > len(mount.MountPath) {
				mount = m
			}
		}
		for _, v := range pod.Volumes {
			if v.Name == mount.Name && v.HostPath != nil {
				return v.HostPath.Path + strings.TrimPrefix(file, mount.MountPath)
			}
		}
		return ""
	}
	for _, name := range []string{"bundled etcd restored", "bundled etcd on volumes, restored"} {
		pods := podsOf(decoded(t, variants[name]))
		written, read := "", ""
		for _, arg := range slices.Concat(pods["snapshot"].Containers[0].Args, pods["run"].Containers[0].Args) {
			if dir, ok := strings.CutPrefix(arg, "--dir="); ok {
				written = of(pods["snapshot"], dir+"/egret-1.db")
			}
			if file, ok := strings.CutPrefix(arg, "--restore-from="); ok {
				read = of(pods["run"], file)
			}
		}
		if want := "/var/lib/egret-etcd/snapshots/egret-1.db"; written != want || read != want {
			t.Errorf("%s: it is written to %q of the node and read from %q, want %s", name, written, read, want)
		}
	}
}
