package v1beta1

import (
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
)

// GroupVersion is the group and version of the objects of this package.
var GroupVersion = schema.GroupVersion{Group: "crd.antrea.io", Version: "v1beta1"}

// The resources, as the API server's paths name them.
var (
	EgressResource = GroupVersion.WithResource("egresses")
	PoolResource   = GroupVersion.WithResource("externalippools")
)

var schemeBuilder = runtime.NewSchemeBuilder(func(s *runtime.Scheme) error {
	s.AddKnownTypes(GroupVersion, &Egress{}, &EgressList{}, &ExternalIPPool{}, &ExternalIPPoolList{})
	metav1.AddToGroupVersion(s, GroupVersion)
	return nil
})

// AddToScheme adds the types of this package to a scheme.
var AddToScheme = schemeBuilder.AddToScheme
