package zone

// Config is one zone: host names with a certificate, a key behind a key server, and the origins that answer for them.
type Config struct {
	// Name identifies the zone in logs, metrics and session tickets. It must be unique.
	Name string `mapstructure:"name"`
	// Hosts holds exact names and "*." wildcards that cover one label. A host belongs to one zone.
	Hosts []string `mapstructure:"hosts"`
	// Certificate is a file with the certificate chain in PEM, leaf first.
	Certificate string `mapstructure:"certificate"`
	// Certificates holds several such files in place of Certificate, best first, each with a key of its own: of two types,
	// or the old and the new one while keys are rotated. A visitor gets the first that it can verify, that is in
	// force, and whose key signs.
	Certificates []string `mapstructure:"certificates"`
	// KeyServer names the group of key servers that holds the leaves' private keys.
	KeyServer string `mapstructure:"key_server"`
	// AllowRSADecrypt lets visitors without ECDHE use TLS_RSA_WITH_AES_128_GCM_SHA256, which needs RSA decryption by the
	// key server and has no forward secrecy. The key server must allow it as well.
	AllowRSADecrypt bool `mapstructure:"allow_rsa_decrypt"`
	// PlainDigest asks for signatures of digests, for key servers that do not know context-bound signing.
	PlainDigest bool `mapstructure:"plain_digest"`
	// HTTP holds the versions offered: "1.1", "2", "3". Empty means all.
	HTTP []string `mapstructure:"http"`
	// KeyEpoch is part of what binds a session ticket. Raising it makes every earlier ticket of the zone worthless, as
	// after the revocation of a key. A new key has the same effect by itself.
	KeyEpoch uint64 `mapstructure:"key_epoch"`
	// Origins holds where requests go, by the longest matching path.
	Origins []Origin `mapstructure:"origins"`
}

// Origin is a server behind the tunnel.
type Origin struct {
	// Path is a prefix of the request's path, matched byte by byte at a segment's end. Empty means every path.
	Path string `mapstructure:"path"`
	// URL is http://host:port or https://host:port, without a path.
	URL string `mapstructure:"url"`
	// VNet is the virtual network of the host. Empty means the default network.
	VNet string `mapstructure:"vnet"`
	// H2C speaks HTTP/2 to an http:// origin, as gRPC servers without TLS need it.
	H2C bool `mapstructure:"h2c"`
	// Host replaces the Host header that the origin sees. Empty means the visitor's.
	Host string `mapstructure:"host"`
	// TLS says how an https:// origin is verified.
	TLS OriginTLS `mapstructure:"tls"`
}

// OriginTLS says how the certificate of an https:// origin is verified. The zero value verifies the URL's host with the
// system's roots.
type OriginTLS struct {
	// CA is a PEM file with the roots to trust instead of the system's.
	CA string `mapstructure:"ca"`
	// ServerName is the name to ask for and to verify instead of the URL's host.
	ServerName string `mapstructure:"server_name"`
	// InsecureSkipVerify accepts any certificate. The tunnel still authenticates the site, not the origin in it.
	InsecureSkipVerify bool `mapstructure:"insecure_skip_verify"`
}
