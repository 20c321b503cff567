package manifests

import (
	"testing"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/runtime"
)

// For the tests that need an API server: their helper imports this package.
var Renderer, Program = renderer, egret

var (
	// PodSpecs are those of manifests/deploy, by the command that they run, and PodsOf those of the chart with some of
	// the values of variants.
	PodSpecs = podSpecs
	PodsOf   = func(t testing.TB, variant string) map[string]corev1.PodSpec {
		return podsOf(decoded(t, variants[variant]))
	}
	// ObjectsOf are all objects of the chart.
	ObjectsOf = func(t testing.TB, variant string) (out []runtime.Object) {
		for _, d := range decoded(t, variants[variant]) {
			out = append(out, d.object)
		}
		return out
	}
)
