package manifests

//go:generate sh -c "cp crds/*.yaml ../charts/egret/files/crds/ && rm -f deploy/*.yaml && go run -C render . -values ../values.yaml -out ../deploy ../../charts/egret"
