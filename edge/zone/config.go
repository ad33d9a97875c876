package zone

// Config is one zone: host names with a certificate, a key behind a key server, and the origins that answer for them.
type Config struct {
	// Name identifies the zone in logs, metrics and session tickets. It must be unique.
	Name string `mapstructure:"name" json:"name"`
	// Hosts holds exact names and "*." wildcards that cover one label. A host belongs to one zone.
	Hosts []string `mapstructure:"hosts" json:"hosts"`
	// Certificate is a file with the certificate chain in PEM, leaf first.
	Certificate string `mapstructure:"certificate" json:"certificate,omitempty"`
	// Certificates holds several such files in place of Certificate, best first, each with a key of its own: of two types,
	// or the old and the new one while keys are rotated. A visitor gets the first that it can verify, that is in
	// force, and whose key signs.
	Certificates []string `mapstructure:"certificates" json:"certificates,omitempty"`
	// CertificatePEM is the chain itself in place of a file, for zones that come from the control plane.
	CertificatePEM string `mapstructure:"-" json:"certificate_pem,omitempty"`
	// KeyServer names the group of key servers that holds the leaves' private keys.
	KeyServer string `mapstructure:"key_server" json:"key_server,omitempty"`
	// AllowRSADecrypt lets visitors without ECDHE use TLS_RSA_WITH_AES_128_GCM_SHA256, which needs RSA decryption by the
	// key server and has no forward secrecy. The key server must allow it as well.
	AllowRSADecrypt bool `mapstructure:"allow_rsa_decrypt" json:"allow_rsa_decrypt,omitempty"`
	// PlainDigest asks for signatures of digests, for key servers that do not know context-bound signing.
	PlainDigest bool `mapstructure:"plain_digest" json:"plain_digest,omitempty"`
	// HTTP holds the versions offered: "1.1", "2", "3". Empty means all.
	HTTP []string `mapstructure:"http" json:"http,omitempty"`
	// KeyEpoch is part of what binds a session ticket. Raising it makes every earlier ticket of the zone worthless, as
	// after the revocation of a key. A new key has the same effect by itself.
	KeyEpoch uint64 `mapstructure:"key_epoch" json:"key_epoch,omitempty"`
	// Origins holds where requests go, by the longest matching path.
	Origins []Origin `mapstructure:"origins" json:"origins,omitempty"`
}

// Origin is a server behind the tunnel, a pool of them, the ingress of a tunnel, or a directory of the edge from which
// connectors are installed: exactly one of URL, Pool, Tunnel and Install is set.
type Origin struct {
	// Path is a prefix of the request's path, matched byte by byte at a segment's end. Empty means every path.
	Path string `mapstructure:"path" json:"path,omitempty"`
	// URL is http://host:port or https://host:port, without a path.
	URL string `mapstructure:"url" json:"url,omitempty"`
	// Pool names a pool whose endpoints answer.
	Pool string `mapstructure:"pool" json:"pool,omitempty"`
	// Scheme is "http" or "https", for a pool. Empty means http.
	Scheme string `mapstructure:"scheme" json:"scheme,omitempty"`
	// Tunnel, name or id, is the one whose connectors' ingress rules say what answers.
	Tunnel string `mapstructure:"tunnel" json:"tunnel,omitempty"`
	// Install is the absolute path of a directory that the edge itself serves, with a script that installs the connector from
	// it. Only zones of the edge's own configuration have one.
	Install string `mapstructure:"install" json:"-"`
	// InstallKeys are the public keys of minisign, one of which must have signed the directory's SHA256SUMS.
	InstallKeys []string `mapstructure:"install_keys" json:"-"`
	// ProxyProtocol, "v1" or "v2", tells the origin the visitor's address ahead of everything else. Each connection of a
	// visitor then has connections of its own to the origin. A pool has its own setting.
	ProxyProtocol string `mapstructure:"proxy_protocol" json:"proxy_protocol,omitempty"`
	// Carrier is what the requests go over: "quic", "tcp" (bulk connections), or empty, which sends large bodies over what
	// is made for them, and all others over QUIC.
	Carrier string `mapstructure:"carrier" json:"carrier,omitempty"`
	// VNet is the virtual network of the URL's host. Empty means the default network.
	VNet string `mapstructure:"vnet" json:"vnet,omitempty"`
	// H2C speaks HTTP/2 to an http:// origin, as gRPC servers without TLS need it.
	H2C bool `mapstructure:"h2c" json:"h2c,omitempty"`
	// Host replaces the Host header that the origin sees. Empty means the visitor's.
	Host string `mapstructure:"host" json:"host,omitempty"`
	// TLS says how an https:// origin is verified.
	TLS OriginTLS `mapstructure:"tls" json:"tls,omitzero"`
}

// OriginTLS says how the certificate of an https:// origin is verified. The zero value verifies the URL's host with the
// system's roots.
type OriginTLS struct {
	// CA is a PEM file with the roots to trust instead of the system's.
	CA string `mapstructure:"ca" json:"ca,omitempty"`
	// CAPEM holds the roots themselves, for zones that come from the control plane.
	CAPEM string `mapstructure:"-" json:"ca_pem,omitempty"`
	// ServerName is the name to ask for and to verify instead of the URL's host.
	ServerName string `mapstructure:"server_name" json:"server_name,omitempty"`
	// InsecureSkipVerify accepts any certificate. The tunnel still authenticates the site, not the origin in it.
	InsecureSkipVerify bool `mapstructure:"insecure_skip_verify" json:"insecure_skip_verify,omitempty"`
}
